// Drives the CPU kernels for tools/sanitize.py: a line of stdin is a problem, a line of stdout what is wrong with it.
//
// Every tensor is an allocation of its own, of the exact size; outputs are full of NaN before. Results are held against
// plain loops in double, and those of any number of threads, bit for bit, against each other; those of a stretch, bit for
// bit, against what its steps give one by one.
#include <algorithm>
#include <cmath>
#include <condition_variable>
#include <cstring>
#include <functional>
#include <iostream>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <sstream>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "../decompk/kernels/cpu/functions.h"

extern "C" {  // as decompk/kernels/cpu defines them
using Backward = void(const float* a, const float* b, float* to, const Long* sizes);
Backward dgrad, wgrad, winograd_dgrad, winograd_wgrad;
void batch_norm(const float* x, const float* weight, const float* bias, float* running_mean, float* running_var,
                const float* residual, float* y, float* saved, int training, int relu, double momentum, double eps,
                Long K, Long rows, Long C);
void batch_norm_backward(const float* dy, const float* x, const float* y, const float* saved, int training, int relu,
                         float* dx, float* dweight, float* dbias, float* g, Long K, Long rows, Long C);
void layer_norm(const float* x, const float* weight, const float* bias, float* y, float* saved, double eps, Long K,
                Long R, Long D);
void layer_norm_backward(const float* dy, const float* x, const float* weight, const float* saved, float* dx,
                         float* dweight, float* dbias, Long K, Long R, Long D);
void stretch(const void* steps, Long count, Long members, const float* x, float* result, float* room, float* const* tensors);
void stretch_backward(const void* steps, Long count, Long members, const float* x, const float* result, const float* room,
                      const float* dz, float* dx, float* gradients, Long size, float* const* tensors, float* const* found);
}

// ---- OpenMP as GCC calls it, on std::thread: ThreadSanitizer sees all synchronisation in it, and none in libgomp -----

namespace {

int threads = 1;

struct Team {
  int size = threads;
  std::mutex lock;
  std::condition_variable passed;
  int waiting = 0;
  Long barriers = 0;
};
struct Chunks {
  Long next, end, size, stride;
};
thread_local Team* team = nullptr;
thread_local int number = 0;
thread_local Chunks chunks;

// Chunks go round the threads: taking one from a common counter would order threads that nothing else orders.
template <typename T>
bool next_chunk(T* from, T* until) {
  if (chunks.next >= chunks.end) return false;
  *from = chunks.next, *until = std::min(chunks.next + chunks.size, chunks.end);
  chunks.next += chunks.stride;
  return true;
}

}  // namespace

extern "C" {
int omp_get_num_threads() { return team ? team->size : 1; }
int omp_get_max_threads() { return threads; }
int omp_in_parallel() { return team && team->size > 1; }
int omp_get_thread_num() { return number; }

void GOMP_parallel(void (*body)(void*), void* data, unsigned, unsigned) {
  Team own;
  if (team) {  // inside another, a team of one
    auto kept = std::tuple(team, number, chunks);
    own.size = 1, team = &own, number = 0;
    body(data);
    std::tie(team, number, chunks) = kept;
    return;
  }
  std::vector<std::thread> others;
  auto run = [&](int i) { team = &own, number = i, body(data), team = nullptr, number = 0; };
  for (int i = 1; i < threads; ++i) others.emplace_back(run, i);
  run(0);
  for (auto& thread : others) thread.join();
}
void GOMP_barrier() {
  std::unique_lock<std::mutex> held(team->lock);
  Long before = team->barriers;
  if (++team->waiting == team->size) team->waiting = 0, ++team->barriers, team->passed.notify_all();
  else team->passed.wait(held, [&] { return team->barriers != before; });
}
bool GOMP_loop_nonmonotonic_dynamic_next(Long* from, Long* until) { return next_chunk(from, until); }
bool GOMP_loop_nonmonotonic_dynamic_start(Long start, Long end, Long, Long size, Long* from, Long* until) {
  chunks = {start + number * size, end, size, size * omp_get_num_threads()};
  return next_chunk(from, until);
}
using Ull = unsigned long long;
bool GOMP_loop_ull_nonmonotonic_dynamic_next(Ull* from, Ull* until) { return next_chunk(from, until); }
bool GOMP_loop_ull_nonmonotonic_dynamic_start(bool, Ull start, Ull end, Ull, Ull size, Ull* from, Ull* until) {
  chunks = {Long(start + number * size), Long(end), Long(size), Long(size * omp_get_num_threads())};
  return next_chunk(from, until);
}
void GOMP_loop_end_nowait() {}
void GOMP_loop_end() { GOMP_barrier(); }
}

// ---- tensors and what is checked of them ----------------------------------------------------------------------------

namespace {

#define UNSANITIZED __attribute__((no_sanitize("address", "thread", "undefined")))  // its own loops: they are slow

const float POISONED = std::numeric_limits<float>::quiet_NaN();
std::mt19937 engine;
std::string faults;
std::vector<int> thread_counts;

struct Floats {
  size_t size = 0;
  std::unique_ptr<float[]> at;  // null: the tensor is absent

  Floats() = default;
  explicit Floats(size_t size) : size(size), at(new float[size]) { std::fill_n(at.get(), size, POISONED); }
  Floats(const Floats& other) {
    if (!other.at) return;
    *this = Floats(other.size);
    std::copy_n(other.get(), size, get());
  }
  Floats(Floats&&) = default;
  Floats& operator=(Floats&&) = default;
  float* get() const { return at.get(); }
  float& operator[](size_t i) const { return at[i]; }
  bool same(const Floats& other) const { return !size || !std::memcmp(get(), other.get(), size * sizeof(float)); }
};

unsigned char* bytes_of(const Floats& floats) { return reinterpret_cast<unsigned char*>(floats.get()); }

UNSANITIZED Floats random(size_t size, double deviation = 1, double middle = 0) {
  std::normal_distribution<double> normal(middle, deviation);
  Floats found(size);
  for (size_t i = 0; i < size; ++i) found[i] = float(normal(engine));
  return found;
}

void fault(const std::string& what) { faults += (faults.empty() ? "" : "; ") + what; }

UNSANITIZED void compare(const std::string& name, const Floats& found, const std::vector<double>& reference,
                         double tolerance) {
  if (found.size != reference.size())
    return fault(name + " has " + std::to_string(found.size) + " values, not " + std::to_string(reference.size()));
  double worst = 0;
  for (size_t i = 0; i < found.size; ++i) {
    if (!std::isfinite(found[i]) || !std::isfinite(reference[i])) {
      bool same = found[i] == reference[i] || (std::isnan(found[i]) && std::isnan(reference[i]));
      if (!same) return fault(name + " is " + std::to_string(found[i]) + " at " + std::to_string(i));
      continue;
    }
    worst = std::max(worst, std::abs(found[i] - reference[i]));
  }
  std::ostringstream text;
  text << name << " is wrong by " << worst << " where " << tolerance << " is allowed";
  if (!(worst <= tolerance)) fault(text.str());
}

using Named = std::map<std::string, Floats>;

// The outputs that run(inputs, outputs) leaves on every number of threads; a fault where they differ or inputs change.
Named run_on_threads(const Named& inputs, const Named& before, std::function<void(Named&, Named&)> run) {
  Named first;
  for (int count : thread_counts) {
    threads = count;
    Named in = inputs, out = before;
    run(in, out);
    for (auto& [name, tensor] : inputs)
      if (!tensor.same(in[name])) fault(name + ", an input, was written");
    for (auto& [name, tensor] : out)
      if (!first.empty() && !tensor.same(first[name])) fault(name + " has other bits on " + std::to_string(count) + " threads");
    if (first.empty()) first = std::move(out);
  }
  return first;
}

double largest(const std::vector<double>& values) {  // of those that are finite
  double most = 0;
  for (double value : values)
    if (std::isfinite(value)) most = std::max(most, std::abs(value));
  return most;
}

// ---- convolutions ---------------------------------------------------------------------------------------------------

struct Products {
  std::vector<double> sums, sizes;  // Σ a · b and Σ |a · b| of every output
};

UNSANITIZED Products plain(const std::string& kind, const Long* s, const Floats& x, const Floats& w, const Floats& dy,
                           By by = DIRECT) {
  auto [K, N, C, O, H, W, kh, kw] = std::tie(s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7]);
  Long rows = s[12], columns = s[13];
  size_t size = kind == "fprop" ? dy.size : kind == "dgrad" ? x.size : w.size;
  Products found{std::vector<double>(size), std::vector<double>(size)};
  for (Long image = 0; image < K * N; ++image)
    for (Long h = 0; h < rows; ++h)
      for (Long v = 0; v < columns; ++v)
        for (Long r = 0; r < kh; ++r)
          for (Long t = 0; t < kw; ++t) {
            Long row = h * s[8] + r - s[10], column = v * s[9] + t - s[11];
            if (row < 0 || row >= H || column < 0 || column >= W) continue;
            for (Long o = 0; o < O; ++o)
              for (Long c = by == BY_CHANNEL ? o : 0; c < (by == BY_CHANNEL ? o + 1 : C); ++c) {
                Long in = ((image * H + row) * W + column) * C + c, out = ((image * rows + h) * columns + v) * O + o;
                Long tap = ((image / N * O + o) * kh + r) * kw + t;
                if (by != BY_CHANNEL) tap = tap * C + c;
                Long to = kind == "fprop" ? out : kind == "dgrad" ? in : tap;
                double product = kind == "fprop"   ? double(x[in]) * w[tap]
                                 : kind == "dgrad" ? double(dy[out]) * w[tap]
                                                   : double(x[in]) * dy[out];
                found.sums[to] += product, found.sizes[to] += std::abs(product);
              }
          }
  return found;
}

// kind, form, with a bias or not, what is not finite and how often, and Shape's numbers as conv.h has them
void convolution(std::istream& line) {
  std::string kind, form;
  bool biased;
  std::string hot, text;
  double share;
  Long s[14];
  line >> kind >> form >> biased >> hot >> text >> share;
  for (Long& value : s) line >> value;
  Long outputs = s[0] * s[1] * s[12] * s[13] * s[3];
  Named in;
  in["x"] = random(s[0] * s[1] * s[4] * s[5] * s[2]), in["w"] = random(s[0] * s[3] * s[6] * s[7] * s[2]);
  in["dy"] = random(outputs), in["bias"] = biased ? random(s[0] * s[3]) : Floats();
  for (size_t i = 0; i < in[hot].size / s[0]; ++i)  // of the first member
    if (std::uniform_real_distribution<>()(engine) < share) in[hot][i] = text == "nan" ? POISONED : HUGE_VALF;
  Products wanted = plain(kind, s, in["x"], in["w"], in["dy"]);
  if (biased && kind == "fprop")
    for (Long i = 0; i < outputs; ++i) wanted.sums[i] += in["bias"][i / (outputs / s[0]) * s[3] + i % s[3]];
  Named out;
  out[kind] = Floats(wanted.sums.size());
  bool direct = form == "direct";
  Named found = run_on_threads(in, out, [&](Named& in, Named& out) {
    float *x = in["x"].get(), *w = in["w"].get(), *dy = in["dy"].get(), *to = out[kind].get();
    auto null = nullptr;
    if (kind == "fprop") layer(x, w, in["bias"].get(), null, null, null, null, null, to, null, null, 0, 0, 0, !direct, s);
    if (kind == "dgrad") (direct ? dgrad : winograd_dgrad)(dy, w, to, s);
    if (kind == "wgrad") (direct ? wgrad : winograd_wgrad)(x, dy, to, s);
  });
  compare(kind, found[kind], wanted.sums, 1e-5 * std::max(largest(wanted.sizes), 1.));
}

// ---- batch norms ----------------------------------------------------------------------------------------------------

// K, rows, C, training, relu, with weight, bias, running statistics, residual or not, momentum, eps
UNSANITIZED void norm(std::istream& line) {
  Long K, rows, C;
  bool training, relu, weighted, biased, running, added;
  double momentum, eps;
  line >> K >> rows >> C >> training >> relu >> weighted >> biased >> running >> added >> momentum >> eps;
  Long vectors = K * C, count = K * rows * C;
  auto if_wanted = [](bool wanted, Floats made) { return wanted ? std::move(made) : Floats(); };
  Named in, out;
  in["x"] = random(count, 2, 3), in["residual"] = if_wanted(added, random(count));
  in["weight"] = if_wanted(weighted, random(vectors, 0.3, 1)), in["bias"] = if_wanted(biased, random(vectors));
  out["y"] = Floats(count), out["saved"] = Floats(4 * vectors);
  out["running_mean"] = if_wanted(running, random(vectors, 1, 3));
  out["running_var"] = if_wanted(running, random(vectors, 0.1, 2));
  const Floats old_mean = out["running_mean"], old_var = out["running_var"];
  Named forward = run_on_threads(in, out, [&](Named& in, Named& out) {
    batch_norm(in["x"].get(), in["weight"].get(), in["bias"].get(), out["running_mean"].get(), out["running_var"].get(),
               in["residual"].get(), out["y"].get(), out["saved"].get(), training, relu, momentum, eps, K, rows, C);
  });

  using Doubles = std::vector<double>;
  Doubles mean(vectors), var(vectors), rstd(vectors), scale(vectors), moved_mean(vectors), moved_var(vectors);
  double slack = 1;  // what rounding x costs y: its distance from zero in deviations
  auto each = [&](auto body) {
    for (Long i = 0; i < count; ++i) body(i, i / (rows * C) * C + i % C);
  };
  const Floats &x = in["x"], &weight = in["weight"], &bias = in["bias"], &residual = in["residual"];
  each([&](Long i, Long c) { mean[c] += double(x[i]) / rows; });
  each([&](Long i, Long c) { var[c] += (x[i] - mean[c]) * (x[i] - mean[c]) / rows; });
  for (Long c = 0; c < vectors; ++c) {
    if (running) moved_mean[c] = old_mean[c] + momentum * (mean[c] - old_mean[c]);
    if (running) moved_var[c] = old_var[c] + momentum * (var[c] * rows / (rows - 1) - old_var[c]);
    if (!training) moved_mean[c] = mean[c] = old_mean[c], moved_var[c] = var[c] = old_var[c];
    rstd[c] = 1 / std::sqrt(var[c] + eps), scale[c] = weighted ? rstd[c] * weight[c] : rstd[c];
    slack = std::max(slack, 10 * rstd[c]);
  }
  Doubles y(count), before(count);
  each([&](Long i, Long c) {
    before[i] = (x[i] - mean[c]) * scale[c] + (biased ? bias[c] : 0) + (added ? residual[i] : 0);
    y[i] = relu ? std::max(before[i], 0.) : before[i];
  });
  compare("y", forward["y"], y, 1e-5 * slack * (1 + largest(y)));
  if (running) compare("running_mean", forward["running_mean"], moved_mean, 1e-4);
  if (running) compare("running_var", forward["running_var"], moved_var, 1e-5 * (1 + largest(moved_var)));
  for (size_t i = 0; i < forward["saved"].size; ++i)
    if (forward["saved"][i] != forward["saved"][i]) fault("saved is NaN at " + std::to_string(i));

  in["dy"] = random(count), in["saved"] = std::move(forward["saved"]);
  each([&](Long i, Long) { if (relu && std::abs(before[i]) < 1e-4 * slack) in["dy"][i] = 0; });  // either side is right
  in["y"] = if_wanted(relu && added, std::move(forward["y"]));
  out.clear();
  out["dx"] = Floats(count), out["dweight"] = Floats(vectors), out["dbias"] = Floats(vectors);
  out["g"] = if_wanted(relu && added, Floats(count));
  Named backward = run_on_threads(in, out, [&](Named& in, Named& out) {
    batch_norm_backward(in["dy"].get(), in["x"].get(), in["y"].get(), in["saved"].get(), training, relu, out["dx"].get(),
                        out["dweight"].get(), out["dbias"].get(), out["g"].get(), K, rows, C);
  });
  Doubles g(count), dx(count), dweight(vectors), dbias(vectors), sizes(vectors), parts(vectors);
  each([&](Long i, Long c) {
    g[i] = relu && before[i] <= 0 ? 0 : in["dy"][i];
    double part = g[i] * (in["x"][i] - mean[c]) * rstd[c];
    dbias[c] += g[i], dweight[c] += part, sizes[c] += std::abs(g[i]), parts[c] += std::abs(part);
  });
  double steepest = 1;
  each([&](Long i, Long c) {
    double normalised = (in["x"][i] - mean[c]) * rstd[c];
    dx[i] = scale[c] * (g[i] - (training ? (dbias[c] + normalised * dweight[c]) / rows : 0));
    steepest = std::max(steepest, std::abs(scale[c] * g[i]));
  });
  compare("dx", backward["dx"], dx, 1e-5 * slack * steepest);
  compare("dweight", backward["dweight"], dweight, 1e-5 * slack * (1 + largest(parts)));
  compare("dbias", backward["dbias"], dbias, 1e-5 * (1 + largest(sizes)));
  if (relu && added) compare("g", backward["g"], g, 0);
}

// ---- layer norms ----------------------------------------------------------------------------------------------------

// K, R, D, with weight and bias or not, whether dx, dweight and dbias are wanted, the mean, eps
UNSANITIZED void row_norm(std::istream& line) {
  Long K, R, D;
  bool weighted, biased, input, scales, shifts;
  double middle, eps;
  line >> K >> R >> D >> weighted >> biased >> input >> scales >> shifts >> middle >> eps;
  Long rows = K * R, vectors = K * D, count = rows * D;
  auto if_wanted = [](bool wanted, Floats made) { return wanted ? std::move(made) : Floats(); };
  Named in, out;
  in["x"] = random(count, 1, middle), in["dy"] = random(count);
  in["weight"] = if_wanted(weighted, random(vectors, 0.3, 1)), in["bias"] = if_wanted(biased, random(vectors));
  out["y"] = Floats(count), out["saved"] = Floats(3 * rows);
  Named forward = run_on_threads(in, out, [&](Named& in, Named& out) {
    layer_norm(in["x"].get(), in["weight"].get(), in["bias"].get(), out["y"].get(), out["saved"].get(), eps, K, R, D);
  });
  in["saved"] = std::move(forward["saved"]);
  out.clear();
  out["dx"] = if_wanted(input, Floats(count));
  out["dweight"] = if_wanted(scales, Floats(vectors)), out["dbias"] = if_wanted(shifts, Floats(vectors));
  Named backward = run_on_threads(in, out, [&](Named& in, Named& out) {
    layer_norm_backward(in["dy"].get(), in["x"].get(), in["weight"].get(), in["saved"].get(), out["dx"].get(),
                        out["dweight"].get(), out["dbias"].get(), K, R, D);
  });

  using Doubles = std::vector<double>;
  Doubles y(count), dx(count), dweight(vectors), dbias(vectors), sizes(vectors), parts(vectors);
  const Floats &x = in["x"], &dy = in["dy"], &weight = in["weight"], &bias = in["bias"];
  double steepest = 1;
  for (Long row = 0; row < rows; ++row) {
    Long at = row * D, of = row / R * D;
    double mean = 0, var = 0, share = 0, slope = 0;
    for (Long i = 0; i < D; ++i) mean += double(x[at + i]) / D;
    for (Long i = 0; i < D; ++i) var += (x[at + i] - mean) * (x[at + i] - mean) / D;
    double rstd = 1 / std::sqrt(var + eps);
    steepest = std::max(steepest, 10 * rstd);
    for (Long i = 0; i < D; ++i) {
      double normalised = (x[at + i] - mean) * rstd, g = weighted ? double(dy[at + i]) * weight[of + i] : dy[at + i];
      y[at + i] = normalised * (weighted ? weight[of + i] : 1) + (biased ? bias[of + i] : 0);
      dweight[of + i] += dy[at + i] * normalised, parts[of + i] += std::abs(dy[at + i] * normalised);
      dbias[of + i] += dy[at + i], sizes[of + i] += std::abs(dy[at + i]);
      share += g / D, slope += g * normalised / D;
    }
    for (Long i = 0; i < D; ++i) {
      double normalised = (x[at + i] - mean) * rstd, g = weighted ? double(dy[at + i]) * weight[of + i] : dy[at + i];
      dx[at + i] = rstd * (g - share - normalised * slope);
    }
  }
  compare("y", forward["y"], y, 1e-5 * (1 + largest(y)));
  if (input) compare("dx", backward["dx"], dx, 1e-5 * steepest * (1 + largest(y)));
  if (scales) compare("dweight", backward["dweight"], dweight, 1e-5 * (1 + largest(parts)));
  if (shifts) compare("dbias", backward["dbias"], dbias, 1e-5 * (1 + largest(sizes)));
}

// ---- max-pooling ----------------------------------------------------------------------------------------------------

// Shape's numbers, K = 1
UNSANITIZED void pool(std::istream& line) {
  Long s[14];
  for (Long& value : s) line >> value;
  Long N = s[1], C = s[2], H = s[4], W = s[5], rows = s[12], columns = s[13], count = N * rows * columns * C;
  Named in, out;
  in["x"] = random(N * H * W * C), in["dy"] = random(count);
  for (size_t i = 0; i < in["x"].size; ++i) in["x"][i] = std::round(3 * in["x"][i]);  // with equal values
  out["y"] = Floats(count), out["place"] = Floats((count + 3) / 4);
  Named forward = run_on_threads(in, out, [&](Named& in, Named& out) {
    max_pool(in["x"].get(), out["y"].get(), bytes_of(out["place"]), s);
  });
  in["place"] = std::move(forward["place"]);
  out.clear();
  out["dx"] = Floats(in["x"].size);
  Named backward = run_on_threads(in, out, [&](Named& in, Named& out) {
    max_unpool(in["dy"].get(), bytes_of(in["place"]), out["dx"].get(), s);
  });
  std::vector<double> y(count), dx(in["x"].size);
  for (Long at = 0; at < count; ++at) {
    Long c = at % C, w = at / C % columns, h = at / C / columns % rows, n = at / C / columns / rows, most = -1;
    for (Long r = std::max(0L, s[10] - h * s[8]); r < s[6] && h * s[8] - s[10] + r < H; ++r)
      for (Long t = std::max(0L, s[11] - w * s[9]); t < s[7] && w * s[9] - s[11] + t < W; ++t) {
        Long from = ((n * H + h * s[8] - s[10] + r) * W + w * s[9] - s[11] + t) * C + c;
        if (most < 0 || in["x"][from] > in["x"][most]) most = from;
      }
    y[at] = in["x"][most], dx[most] += in["dy"][at];
  }
  compare("y", forward["y"], y, 0);
  compare("dx", backward["dx"], dx, 1e-5);
}

// ---- layers: a convolution with what stands behind it ----------------------------------------------------------------

// how it is computed, with norm, bias or not, its ReLU, residual or not, whether dx is wanted, and Shape's numbers
UNSANITIZED void whole_layer(std::istream& line) {
  int way, relu;
  bool normed, biased, added, wants;
  Long s[14];
  line >> way >> normed >> biased >> relu >> added >> wants;
  for (Long& value : s) line >> value;
  Long vectors = s[0] * s[3], rows = s[1] * s[12] * s[13], count = vectors * rows, taps = s[6] * s[7] * (way == BY_CHANNEL ? 1 : s[2]);
  bool same = way == BY_CHANNEL || (s[8] * s[9] == 1 && s[12] == s[4] && s[13] == s[5]);
  By by = By(way);
  bool decides = relu && (added || !normed);
  auto if_wanted = [](bool wanted, Floats made) { return wanted ? std::move(made) : Floats(); };
  Named in, out;
  in["x"] = random(s[0] * s[1] * s[4] * s[5] * s[2], 1, 0.5), in["w"] = random(vectors * taps);
  in["bias"] = if_wanted(biased, random(vectors)), in["residual"] = if_wanted(added, random(count));
  in["gamma"] = if_wanted(normed, random(vectors, 0.3, 1)), in["beta"] = if_wanted(normed, random(vectors));
  out["y"] = Floats(count), out["z"] = if_wanted(normed, Floats(count)), out["saved"] = if_wanted(normed, Floats(4 * vectors));
  Named forward = run_on_threads(in, out, [&](Named& in, Named& out) {
    layer(in["x"].get(), in["w"].get(), in["bias"].get(), in["gamma"].get(), in["beta"].get(), nullptr, nullptr,
          in["residual"].get(), out["y"].get(), out["z"].get(), out["saved"].get(), relu, 0, 1e-5, way, s);
  });

  using Doubles = std::vector<double>;
  auto each = [&](auto body) {
    for (Long i = 0; i < count; ++i) body(i, i / (rows * s[3]) * s[3] + i % s[3]);
  };
  Products products = plain("fprop", s, in["x"], in["w"], Floats(count), by);
  Doubles y = products.sums, mean(vectors), var(vectors), rstd(vectors, 1), before(count), z(count);
  each([&](Long i, Long c) { y[i] += biased ? in["bias"][c] : 0, mean[c] += y[i] / rows; });
  each([&](Long i, Long c) { var[c] += (y[i] - mean[c]) * (y[i] - mean[c]) / rows; });
  double slack = 1 + largest(products.sizes);
  for (Long c = 0; c < vectors; ++c) rstd[c] = normed ? 1 / std::sqrt(var[c] + 1e-5) : 1;
  if (normed) slack *= largest(rstd);
  each([&](Long i, Long c) {
    before[i] = normed ? (y[i] - mean[c]) * rstd[c] * in["gamma"][c] + in["beta"][c] : y[i];
    if (added) before[i] += in["residual"][i];
    z[i] = relu ? std::min(std::max(before[i], 0.), relu > 1 ? 6. : HUGE_VAL) : before[i];
  });
  if (normed) compare("y", forward["y"], y, 1e-5 * (1 + largest(products.sizes)));
  compare("z", forward[normed ? "z" : "y"], z, 1e-5 * slack * (1 + largest(z)));

  in["dz"] = random(count), in["y"] = if_wanted(normed, forward["y"]), in["saved"] = std::move(forward["saved"]);
  in["z"] = if_wanted(decides, std::move(forward[normed ? "z" : "y"]));
  auto stops = [&](double value, double by) { return std::abs(value) < by || (relu > 1 && std::abs(value - 6) < by); };
  each([&](Long i, Long) { if (relu && stops(before[i], 1e-4 * slack)) in["dz"][i] = 0; });  // either side is right
  out.clear();
  out["dx"] = if_wanted(wants, Floats(in["x"].size)), out["dw"] = Floats(in["w"].size);
  out["dgamma"] = if_wanted(normed, Floats(vectors)), out["dbeta"] = if_wanted(normed || biased, Floats(vectors));
  out["g"] = if_wanted(normed && added, Floats(count));
  Named backward = run_on_threads(in, out, [&](Named& in, Named& out) {
    Floats dy = if_wanted(wants && !same, Floats(count));
    layer_backward(in["dz"].get(), in["x"].get(), in["w"].get(), in["y"].get(), in["z"].get(), in["saved"].get(), relu,
                   out["dx"].get(), out["dw"].get(), out["dgamma"].get(), out["dbeta"].get(), out["g"].get(), dy.get(),
                   way, s);
  });
  Doubles g(count), dgamma(vectors), dbeta(vectors);
  Floats dy(count);
  each([&](Long i, Long c) {
    g[i] = relu && (before[i] <= 0 || (relu > 1 && before[i] >= 6)) ? 0 : in["dz"][i];
    dbeta[c] += g[i], dgamma[c] += g[i] * (y[i] - mean[c]) * rstd[c];
  });
  each([&](Long i, Long c) {
    double normalised = (y[i] - mean[c]) * rstd[c];
    dy[i] = float(normed ? in["gamma"][c] * rstd[c] * (g[i] - (dbeta[c] + normalised * dgamma[c]) / rows) : g[i]);
  });
  Products dx = plain("dgrad", s, in["x"], in["w"], dy, by), dw = plain("wgrad", s, in["x"], in["w"], dy, by);
  if (wants) compare("dx", backward["dx"], dx.sums, 1e-5 * slack * (1 + largest(dx.sizes)));
  compare("dw", backward["dw"], dw.sums, 1e-5 * slack * (1 + largest(dw.sizes)));
  if (normed) compare("dgamma", backward["dgamma"], dgamma, 1e-5 * slack * rows);
  if (normed || biased) compare("dbeta", backward["dbeta"], dbeta, 1e-5 * slack * rows);
  if (normed && added) compare("g", backward["g"], g, 0);
}

// ---- stretches: several layers and poolings in one call --------------------------------------------------------------

struct Row {  // Step in stretch.cpp
  Long kind, relu, by, by_back, x, residual, y, z, saved, dz, dx, g, dy, room_dx, room_g;
  double momentum, eps;
  Long s[14];
};
const Long NONE = -1, GIVEN = -2, RESULT = -3;
enum Kind : Long { LAYER, POOL, FLATTEN };

// A step, and the values that it reads and adds, by number: 0 what the stretch is given, i + 1 what step i gives.
struct Step : Row {
  bool normed, biased, affine, running;
  Long reads, adds, in, out;  // in, out: how many floats

  Step(std::istream& line, Long K) : Row() {
    line >> kind >> relu >> by >> by_back >> normed >> biased >> affine >> running >> reads >> adds;
    for (Long& value : s) line >> value;
    in = s[0] * s[1] * s[4] * s[5] * s[2], out = s[0] * s[1] * s[12] * s[13] * s[3];
    momentum = 0.3, eps = 1e-5;
  }
  Long vectors() const { return s[0] * s[3]; }
  Long weights() const { return vectors() * s[6] * s[7] * (by == BY_CHANNEL ? 1 : s[2]); }
  Long bytes() const { return (out + 3) / 4; }  // floats that hold the places of a pooling's maxima
  bool same() const { return by == BY_CHANNEL || (s[8] * s[9] == 1 && s[12] == s[4] && s[13] == s[5]); }
  bool decides() const { return relu && (!normed || adds >= 0); }
};

// Places side by side in one memory of `size` floats: what is given back is taken again, so that what is read or written
// too late, or by a thread that is at another step, meets other numbers there.
struct Places {
  Long size = 0;
  std::vector<std::pair<Long, Long>> free;  // place and size

  Long take(Long count) {
    for (auto& one : free)
      if (one.second >= count) {
        Long place = one.first;
        one.first += count, one.second -= count;
        return place;
      }
    return (size += count) - count;
  }
  void give_back(Long place, Long count) {
    if (place >= 0) free.emplace_back(place, count);
  }
};

// Where activations lie; the floats that they take.
Long lay_out(std::vector<Step>& steps) {
  Places room;
  std::vector<Long> values{GIVEN};
  for (Step& step : steps) {
    Long result = &step == &steps.back() ? RESULT : room.take(step.out);
    step.x = values[step.reads], step.residual = step.adds < 0 ? NONE : values[step.adds];
    step.y = step.normed ? room.take(step.out) : result, step.z = step.normed ? result : NONE;
    step.saved = step.kind == POOL ? room.take(step.bytes()) : step.normed ? room.take(4 * step.vectors()) : NONE;
    values.push_back(result);
  }
  return room.size;
}

// The same of gradients, in a member's part of K.
Long lay_out_gradients(std::vector<Step>& steps, Long K, bool wants) {
  Places room;
  std::vector<Long> values(steps.size() + 1, NONE);
  values.back() = RESULT;
  std::vector<bool> found(values.size());
  auto place = [&](Long value, Long size, Long& at, Long& more) {
    at = more = NONE;
    if (value < 0 || (!value && !wants)) return;
    if (values[value] == NONE) values[value] = value ? room.take(size) : GIVEN;
    at = values[value];
    if (found[value]) more = room.take(size);
    found[value] = true;
  };
  for (size_t i = steps.size(); i-- > 0;) {
    Step& step = steps[i];
    Long in = step.in / K, out = step.out / K;
    step.dz = values[i + 1];
    place(step.reads, in, step.dx, step.room_dx);
    place(step.adds, out, step.g, step.room_g);
    step.dy = step.kind != LAYER || step.dx == NONE || step.same() ? NONE : room.take(out);
    room.give_back(step.room_dx, in);
    for (Long used : {step.room_g, step.dy, step.dz}) room.give_back(used, out);
  }
  return room.size;
}

// What a stretch gives, by the functions of its steps, called one by one. Tensors of a step bear its number.
struct OneByOne {
  const std::vector<Step>& steps;
  bool wants;
  Named &in, &out;
  std::vector<Floats> values, y, saved, gradients;

  OneByOne(const std::vector<Step>& steps, bool wants, Named& in, Named& out)
      : steps(steps), wants(wants), in(in), out(out), values(steps.size() + 1), y(steps.size()), saved(steps.size()),
        gradients(steps.size() + 1) {
    values[0] = Floats(in["x"]), gradients.back() = Floats(in["dz"]);
    for (size_t i = 0; i < steps.size(); ++i) forward(i);
    for (size_t i = steps.size(); i-- > 0;) backward(i);
    out["result"] = std::move(values.back()), out["dx"] = std::move(gradients[0]);
  }

  static void turn_over(const Floats& from, Long images, Long rows, Long columns, Floats& to) {
    for (Long i = 0; i < images * rows * columns; ++i) {
      Long r = i / columns % rows, c = i % columns, image = i / (rows * columns);
      to[(image * columns + c) * rows + r] = from[i];
    }
  }

  static float* of(Named& named, const char* name, size_t i) { return named[name + std::to_string(i)].get(); }

  void forward(size_t i) {
    const Step& step = steps[i];
    Floats &x = values[step.reads], &z = values[i + 1] = Floats(step.out);
    if (step.kind == FLATTEN) return turn_over(x, step.s[1], step.s[4] * step.s[5], step.s[2], z);
    if (step.kind == POOL) {
      saved[i] = Floats(step.bytes());
      return max_pool(x.get(), z.get(), bytes_of(saved[i]), step.s);
    }
    if (step.normed) y[i] = Floats(step.out), saved[i] = Floats(4 * step.vectors());
    layer(x.get(), of(in, "w", i), of(in, "bias", i), of(in, "gamma", i), of(in, "beta", i), of(out, "running_mean", i),
          of(out, "running_var", i), step.adds < 0 ? nullptr : values[step.adds].get(), (step.normed ? y[i] : z).get(),
          step.normed ? z.get() : nullptr, saved[i].get(), int(step.relu), step.momentum, step.eps, int(step.by),
          step.s);
  }

  void backward(size_t i) {
    const Step& step = steps[i];
    Floats &dz = gradients[i + 1], dx, g, dy;
    if (step.reads || wants) dx = Floats(step.in);
    if (step.adds > 0 || (!step.adds && wants)) g = Floats(step.out);
    if (step.kind == LAYER && dx.at && !step.same()) dy = Floats(step.out);
    if (step.kind == LAYER)
      layer_backward(dz.get(), values[step.reads].get(), of(in, "w", i), y[i].get(),
                     step.decides() ? values[i + 1].get() : nullptr, saved[i].get(), int(step.relu), dx.get(),
                     of(out, "dw", i), of(out, "dgamma", i), of(out, "dbeta", i), g.get(), dy.get(), int(step.by_back),
                     step.s);
    else if (dx.at && step.kind == FLATTEN) turn_over(dz, step.s[1], step.s[2], step.s[4] * step.s[5], dx);
    else if (dx.at) max_unpool(dz.get(), bytes_of(saved[i]), dx.get(), step.s);
    if (dx.at) add(std::move(dx), gradients[step.reads]);
    if (g.at) add(std::move(g), gradients[step.adds]);
  }

  static void add(Floats part, Floats& to) {
    if (!to.at) to = std::move(part);
    else
      for (size_t i = 0; i < to.size; ++i) to[i] += part[i];
  }
};

// K, whether dx is wanted, how many steps, and of each what Step reads: its kind, its ReLU, how it is computed forward
// and backward, whether it has a norm, a bias, gamma and beta, running statistics; what it reads and adds, -1 for
// nothing; and Shape's numbers, those of a pooling with K = 1
UNSANITIZED void whole_stretch(std::istream& line) {
  Long K, count;
  bool wants;
  line >> K >> wants >> count;
  std::vector<Step> steps;
  for (Long i = 0; i < count; ++i) steps.emplace_back(line, K);
  Long size = lay_out(steps), share = lay_out_gradients(steps, K, wants);
  auto if_wanted = [](bool wanted, Floats made) { return wanted ? std::move(made) : Floats(); };
  Named in, out;
  in["x"] = random(steps[0].in), in["dz"] = random(steps.back().out);
  out["result"] = Floats(steps.back().out), out["dx"] = if_wanted(wants, Floats(steps[0].in));
  for (Long i = 0; i < count; ++i) {
    const Step& step = steps[i];
    std::string of = std::to_string(i);
    Long vectors = step.vectors();
    if (step.kind != LAYER) continue;
    in["w" + of] = random(step.weights(), 1 / std::sqrt(double(step.weights()) / vectors));
    in["bias" + of] = if_wanted(step.biased, random(vectors));
    in["gamma" + of] = if_wanted(step.affine, random(vectors, 0.3, 1));
    in["beta" + of] = if_wanted(step.affine, random(vectors));
    out["running_mean" + of] = if_wanted(step.running, random(vectors));
    out["running_var" + of] = if_wanted(step.running, random(vectors, 0.1, 2));
    out["dw" + of] = Floats(step.weights()), out["dgamma" + of] = if_wanted(step.normed, Floats(vectors));
    out["dbeta" + of] = if_wanted(step.normed || step.biased, Floats(vectors));
  }
  Named wanted = run_on_threads(in, out, [&](Named& in, Named& out) { OneByOne(steps, wants, in, out); });
  Named found = run_on_threads(in, out, [&](Named& in, Named& out) {
    Floats room(size), gradients(K * share);
    std::vector<Row> rows(steps.begin(), steps.end());
    std::vector<float*> tensors, grads;
    for (Long i = 0; i < count; ++i) {
      for (auto name : {"w", "bias", "gamma", "beta"}) tensors.push_back(OneByOne::of(in, name, i));
      for (auto name : {"running_mean", "running_var"}) tensors.push_back(OneByOne::of(out, name, i));
      for (auto name : {"dw", "dgamma", "dbeta"}) grads.push_back(OneByOne::of(out, name, i));
    }
    float *x = in["x"].get(), *result = out["result"].get();
    stretch(rows.data(), count, K, x, result, room.get(), tensors.data());
    const Floats kept = room;
    stretch_backward(rows.data(), count, K, x, result, room.get(), in["dz"].get(), out["dx"].get(), gradients.get(), share,
                     tensors.data(), grads.data());
    if (!room.same(kept)) fault("activations, an input of the backward, were written");
  });
  for (auto& [name, tensor] : found) {
    if (!tensor.same(wanted[name])) fault(name + " has other bits than its steps give one by one");
    for (size_t i = 0; i < tensor.size; ++i)
      if (!std::isfinite(tensor[i])) return fault(name + " is " + std::to_string(tensor[i]) + " at " + std::to_string(i));
  }
}

}  // namespace

// Arguments: the numbers of threads.
int main(int, char** arguments) {
  for (char** each = arguments + 1; *each; ++each) thread_counts.push_back(std::stoi(*each));
  for (std::string text; std::getline(std::cin, text);) {
    std::istringstream line(text);
    std::string op;
    unsigned seed;
    line >> seed >> op;
    engine.seed(seed), faults.clear();
    op == "conv"         ? convolution(line)
    : op == "layer"      ? whole_layer(line)
    : op == "layer_norm" ? row_norm(line)
    : op == "pool"       ? pool(line)
    : op == "stretch"    ? whole_stretch(line)
                         : norm(line);
    std::cout << "answer: " << (line ? faults : "a line of too few numbers") << std::endl;
  }
}
