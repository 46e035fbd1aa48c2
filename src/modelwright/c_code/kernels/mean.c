/* the mean of each row */
static void mean(const float *x, float *y, int rows, int width)
{
    for (int row = 0; row < rows; row++, x += width) {
        float sum = 0.0f;
        for (int i = 0; i < width; i++)
            sum += x[i];
        y[row] = sum / (float)width;
    }
}
