/* each row less its mean over its standard deviation, times w plus b */
static void layer_norm(const float *x, float *y, int rows, int width, float epsilon, const float *w, const float *b)
{
    for (int row = 0; row < rows; row++, x += width, y += width) {
        float sum = 0.0f, squares = 0.0f;
        for (int i = 0; i < width; i++)
            sum += x[i];
        const float middle = sum / (float)width;
        for (int i = 0; i < width; i++)
            squares += (x[i] - middle) * (x[i] - middle);
        const float factor = 1.0f / sqrtf(squares / (float)width + epsilon);
        for (int i = 0; i < width; i++)
            y[i] = (x[i] - middle) * factor * (w ? w[i] : 1.0f) + (b ? b[i] : 0.0f);
    }
}
