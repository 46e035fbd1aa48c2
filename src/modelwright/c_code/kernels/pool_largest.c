/* the largest value of each window; what lies outside the input does not count */
static void pool_largest(const float *x, float *y, int channels, int height, int width, int to_height, int to_width, int kernel_height,
                         int kernel_width, int stride_height, int stride_width, int top, int left, int apart_height, int apart_width)
{
    for (int channel = 0; channel < channels; channel++, x += (long)height * width)
        for (int row = 0; row < to_height; row++)
            for (int column = 0; column < to_width; column++) {
                float largest = -INFINITY;
                for (int down = 0; down < kernel_height; down++)
                    for (int along = 0; along < kernel_width; along++) {
                        const int at = row * stride_height - top + down * apart_height;
                        const int place = column * stride_width - left + along * apart_width;
                        if (at >= 0 && at < height && place >= 0 && place < width && x[(long)at * width + place] > largest)
                            largest = x[(long)at * width + place];
                    }
                *y++ = largest;
            }
}
