"""The matrix product of every kernel."""

import triton
import triton.language as tl


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a · b. In tf32 operands are rounded: tensor cores cut 13 bits off, which errs 2.4 times as much."""
    if PRECISION == "tf32":
        a = tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,r", [a], tl.float32, is_pure=True, pack=1)
        b = tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,r", [b], tl.float32, is_pure=True, pack=1)
    return tl.dot(a, b, acc, input_precision=PRECISION)
