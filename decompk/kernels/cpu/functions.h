// Functions of the library that others of it call, and the driver of the sanitizers.
#pragma once

using Long = long;

// How a layer is computed: as direct.h, winograd.h or by_channel.h does.
enum By { DIRECT, WINOGRAD, BY_CHANNEL };

extern "C" {

void layer(const float* x, const float* w, const float* bias, const float* gamma, const float* beta, float* running_mean,
           float* running_var, const float* residual, float* y, float* z, float* saved, int relu, double momentum, double eps,
           int by, const Long* sizes);
void layer_backward(const float* dz, const float* x, const float* w, const float* y, const float* z, const float* saved,
                    int relu, float* dx, float* dw, float* dgamma, float* dbeta, float* g, float* dy, int by,
                    const Long* sizes);
void max_pool(const float* x, float* y, unsigned char* place, const Long* sizes);
void max_unpool(const float* dy, const unsigned char* place, float* dx, const Long* sizes);

}  // extern "C"
