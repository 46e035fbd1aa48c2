/* the rows of w that whole numbers name; a number outside the table names its first row */
static void embedding(const float *x, float *y, int count, int rows, int width, const weight *w, const float *scale)
{
    for (int i = 0; i < count; i++) {
        const int row = x[i] >= 0.0f && x[i] < (float)rows ? (int)x[i] : 0;
        for (int j = 0; j < width; j++)
            *y++ = (scale ? scale[row] : 1.0f) * (float)w[(long)row * width + j];
    }
}
