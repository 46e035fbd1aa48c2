/* each channel times its scale plus its shift */
static void channels(const float *x, float *y, int number, int inner, const float *scale, const float *shift)
{
    for (int channel = 0; channel < number; channel++)
        for (int i = 0; i < inner; i++)
            *y++ = scale[channel] * *x++ + shift[channel];
}
