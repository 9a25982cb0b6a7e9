// Includes every kernel of one instruction set, in the order of their dependencies.
#include "vec.h"
#include "pack.h"
#include "microkernel.h"
#include "gradient_tile.h"
#ifdef ZSL_AMX
#include "amx_tile.h"
#endif
#include "interference.h"
#include "weighted_grad.h"
#include "gram.h"
#include "ghost.h"
#include "backward.h"
#include "coordinates.h"
#include "scale_bias.h"
#include "row_interference.h"
#include "table.h"
