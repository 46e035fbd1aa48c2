/* an array of four dimensions from one layout to another: y[i · to] = x[i · from] */
static void rearrange(const float *x, float *y, const int *sizes, const int *from, const int *to)
{
    for (int i = 0; i < sizes[0]; i++)
        for (int j = 0; j < sizes[1]; j++)
            for (int k = 0; k < sizes[2]; k++)
                for (int l = 0; l < sizes[3]; l++)
                    y[i * to[0] + j * to[1] + k * to[2] + l * to[3]] = x[i * from[0] + j * from[1] + k * from[2] + l * from[3]];
}
