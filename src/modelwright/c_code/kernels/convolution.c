/* y[outputs][to_height][to_width], a kernel of one row serves one dimension; grouped inputs, zero padding */
static void convolution(const float *x, float *y, int inputs, int height, int width, int outputs, int to_height, int to_width,
                        int kernel_height, int kernel_width, int stride_height, int stride_width, int top, int left,
                        int apart_height, int apart_width, int groups, const weight *w, const float *scale, const float *b)
{
    const int grouped = inputs / groups, of_group = outputs / groups;
    for (int out = 0; out < outputs; out++) {
        const float *start = x + (long)(out / of_group) * grouped * height * width;
        const weight *kernel = w + (long)out * grouped * kernel_height * kernel_width;
        for (int row = 0; row < to_height; row++)
            for (int column = 0; column < to_width; column++) {
                float sum = 0.0f;
                for (int in = 0; in < grouped; in++)
                    for (int down = 0; down < kernel_height; down++) {
                        const int at = row * stride_height - top + down * apart_height;
                        if (at < 0 || at >= height)
                            continue;
                        for (int along = 0; along < kernel_width; along++) {
                            const int place = column * stride_width - left + along * apart_width;
                            if (place >= 0 && place < width)
                                sum += (float)kernel[(in * kernel_height + down) * kernel_width + along] *
                                       start[((long)in * height + at) * width + place];
                        }
                    }
                *y++ = (scale ? scale[out] * sum : sum) + (b ? b[out] : 0.0f);
            }
    }
}
