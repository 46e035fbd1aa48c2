/* the softmax of each row */
static void softmax(const float *x, float *y, int rows, int width)
{
    for (int row = 0; row < rows; row++, x += width, y += width) {
        float largest = x[0], sum = 0.0f;
        for (int i = 1; i < width; i++)
            largest = x[i] > largest ? x[i] : largest;
        for (int i = 0; i < width; i++)
            sum += y[i] = expf(x[i] - largest);
        for (int i = 0; i < width; i++)
            y[i] /= sum;
    }
}
