/* The loops for every processor of the architecture: SSE2 on x86-64, NEON on aarch64. */
#include "core.h"

#define LEVEL "baseline"
#define LOOPS loops_baseline
#include "loops/all.h"
