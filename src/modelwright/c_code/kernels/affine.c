/* y[rows][outputs] = x[rows][inputs] w' + b, with one scale for each output where weights are stored as integers */
static void affine(const float *x, float *y, int rows, int inputs, int outputs, const weight *w, const float *scale, const float *b)
{
    for (int row = 0; row < rows; row++, x += inputs, y += outputs) {
        for (int out = 0; out < outputs; out++) {
            const weight *of = w + (long)out * inputs;
            float sum = 0.0f;
            for (int in = 0; in < inputs; in++)
                sum += (float)of[in] * x[in];
            y[out] = (scale ? scale[out] * sum : sum) + (b ? b[out] : 0.0f);
        }
    }
}
