/* the mean of each window, in which padding counts as zeros */
static void pool_mean(const float *x, float *y, int channels, int height, int width, int to_height, int to_width, int kernel_height,
                      int kernel_width, int stride_height, int stride_width, int top, int left)
{
    for (int channel = 0; channel < channels; channel++, x += (long)height * width)
        for (int row = 0; row < to_height; row++)
            for (int column = 0; column < to_width; column++) {
                float sum = 0.0f;
                for (int down = 0; down < kernel_height; down++)
                    for (int along = 0; along < kernel_width; along++) {
                        const int at = row * stride_height - top + down;
                        const int place = column * stride_width - left + along;
                        if (at >= 0 && at < height && place >= 0 && place < width)
                            sum += x[(long)at * width + place];
                    }
                *y++ = sum / (float)(kernel_height * kernel_width);
            }
}
