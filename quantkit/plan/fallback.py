"""What a tensor gets when its rows are not divisible by the wanted type's block."""

from __future__ import annotations

from quantkit.types import GgmlType as T

# llama-quantize's substitutions: the 32-block type that comes closest without being smaller.
_SUBSTITUTE = {
    T.IQ1_S: T.IQ4_NL,
    T.IQ1_M: T.IQ4_NL,
    T.IQ2_XXS: T.IQ4_NL,
    T.IQ2_XS: T.IQ4_NL,
    T.IQ2_S: T.IQ4_NL,
    T.IQ3_XXS: T.IQ4_NL,
    T.IQ3_S: T.IQ4_NL,
    T.IQ4_XS: T.IQ4_NL,
    T.Q2_K: T.Q4_0,
    T.Q3_K: T.Q4_0,
    T.Q4_K: T.Q5_0,
    T.Q5_K: T.Q5_1,
    T.Q6_K: T.Q8_0,
    T.TQ1_0: T.Q4_0,
    T.TQ2_0: T.Q4_0,
    T.Q1_0: T.Q4_0,
    T.Q2_0: T.Q4_0,
    T.NVFP4: T.MXFP4,
}


def fitting_type(wanted: T, n_cols: int) -> T:
    """The wanted type if rows of `n_cols` weights divide into its blocks, else its substitute.

    Ends at F16, which has no blocks.
    """
    if n_cols % wanted.block_size == 0:
        return wanted
    substitute = _SUBSTITUTE.get(wanted, T.F16)
    return substitute if n_cols % substitute.block_size == 0 else T.F16
