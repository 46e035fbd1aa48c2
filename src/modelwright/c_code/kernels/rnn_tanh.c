/* y[steps][width], each from its input and the one before; scratch: 3 * width */
static void rnn_tanh(const float *x, float *y, int steps, int inputs, int width, const weight *w_x, const float *scale_x, const float *b_x,
                     const weight *w_h, const float *scale_h, const float *b_h, float *scratch)
{
    float *hidden = scratch, *from_x = hidden + width, *from_h = from_x + width;
    for (int i = 0; i < width; i++)
        hidden[i] = 0.0f;
    for (int step = 0; step < steps; step++, x += inputs, y += width) {
        affine(x, from_x, 1, inputs, width, w_x, scale_x, b_x);
        affine(hidden, from_h, 1, width, width, w_h, scale_h, b_h);
        for (int i = 0; i < width; i++)
            y[i] = hidden[i] = tanhf(from_x[i] + from_h[i]);
    }
}
