"""The blocks of GGUF's quantised types, unpacked to one integer a byte.

Layouts: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h. In a byte with two values of 4 bits, the lower
half belongs to the first half of the values that the bytes hold, and the upper half to the second.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from dynexport.exporter.checkpoint.blocks import Array, Blocks, Form

# The values of 4-bit codes. MXFP4's are doubled, and its scales halved.
_IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_E2M1 = (0, 1, 2, 3, 4, 6, 8, 12)
_MXFP4 = (*_E2M1, *(-value for value in _E2M1))
_MXFP4_BIAS = 128
# Integers [R, values], scales [R, blocks] and minima, of R stored blocks or superblocks uint8 [R, bytes].
Unpacked = tuple[Array, Array, Array | None]


def form_of(kind: GGMLQuantizationType) -> Form | None:
    """Return the form of a stored type; None if its values are not integers with a scale per block, or unknown."""
    return _TYPES[kind][0] if kind in _TYPES else None


def unpack(rows: Array, kind: GGMLQuantizationType) -> Blocks | None:
    """Return the blocks of a matrix.

    Args:
        rows: the stored bytes, uint8 [N, bytes of a row].
        kind: the stored type.

    Returns:
        The blocks; None for a type without a form.
    """
    if kind not in _TYPES:
        return None
    form, take_apart = _TYPES[kind]
    with np.errstate(invalid="ignore"):  # a damaged scale; whoever uses the values checks them
        q, scale, minimum = take_apart(rows.reshape(-1, GGML_QUANT_SIZES[kind][1]))
    count = len(rows)
    return Blocks(
        kind=form.kind,
        bits=form.bits,
        zero=form.zero,
        q=q.reshape(count, -1, form.size),
        scale=scale.reshape(count, -1),
        minimum=None if minimum is None else minimum.reshape(count, -1),
    )


def _halves(raw: Array) -> Array:
    """Return two bytes of each row as a float16, widened: float32 [R, 1]."""
    return np.ascontiguousarray(raw).view("<f2").astype(np.float32)


def _nibbles(packed: Array, span: int) -> Array:
    """Return 4-bit values of bytes [R, n]: [R, 2 n]; groups of ``span`` bytes hold 2 * span consecutive values."""
    groups = packed.reshape(len(packed), -1, 1, span)
    return np.concatenate([groups & 15, groups >> 4], axis=2).reshape(len(packed), -1)


def _planes(packed: Array, bits: int, span: int) -> Array:
    """Return ``bits``-bit values of bytes [R, n]: [R, n * 8 / bits], one plane of ``span`` bytes after the other."""
    groups = packed.reshape(len(packed), -1, 1, span)
    planes = [(groups >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
    return np.concatenate(planes, axis=2).reshape(len(packed), -1)


def _fifth_bits(raw: Array) -> Array:
    """Return the 32 bits of 4 bytes, lowest first, each as 0 or 16."""
    return np.unpackbits(np.ascontiguousarray(raw), axis=1, bitorder="little") << 4


def _q4_0(raw: Array) -> Unpacked:
    return _nibbles(raw[:, 2:], 16), _halves(raw[:, :2]), None


def _q4_1(raw: Array) -> Unpacked:
    return _nibbles(raw[:, 4:], 16), _halves(raw[:, :2]), _halves(raw[:, 2:4])


def _q5_0(raw: Array) -> Unpacked:
    return _nibbles(raw[:, 6:], 16) | _fifth_bits(raw[:, 2:6]), _halves(raw[:, :2]), None


def _q5_1(raw: Array) -> Unpacked:
    return _nibbles(raw[:, 8:], 16) | _fifth_bits(raw[:, 4:8]), _halves(raw[:, :2]), _halves(raw[:, 2:4])


def _q8_0(raw: Array) -> Unpacked:
    return raw[:, 2:] ^ 128, _halves(raw[:, :2]), None


def _scales_and_minima(raw: Array) -> tuple[Array, Array]:
    """Return the scales and minima [R, 8] of a superblock of 4 or 5 bits: d and dmin, times 6-bit integers.

    Of 12 bytes, the first four hold scales 0..3 and the next four minima 0..3, in 6 bits each; the upper 2 bits of
    scales and minima 4..7 are in the spare bits of these bytes, and their lower 4 bits in the last four bytes.
    """
    low, middle, high = raw[:, 4:8], raw[:, 8:12], raw[:, 12:16]
    scales = np.concatenate([low & 63, (high & 15) | ((low >> 6) << 4)], axis=1)
    minima = np.concatenate([middle & 63, (high >> 4) | ((middle >> 6) << 4)], axis=1)
    return _halves(raw[:, :2]) * scales.astype(np.float32), -(_halves(raw[:, 2:4]) * minima.astype(np.float32))


def _q4_k(raw: Array) -> Unpacked:
    return _nibbles(raw[:, 16:], 32), *_scales_and_minima(raw)


def _q5_k(raw: Array) -> Unpacked:
    return _nibbles(raw[:, 48:], 32) | (_planes(raw[:, 16:48], 1, 32) << 4), *_scales_and_minima(raw)


def _q2_k(raw: Array) -> Unpacked:
    of_scales, of_minima = (raw[:, :16] & 15).astype(np.float32), (raw[:, :16] >> 4).astype(np.float32)
    return _planes(raw[:, 16:80], 2, 32), _halves(raw[:, 80:82]) * of_scales, -(_halves(raw[:, 82:]) * of_minima)


def _signed_scales(d: Array, low: Array, high: Array) -> Array:
    """Return scales: d times integers of 6 bits less 32, from their lower 4 bits and their upper 2."""
    scales: Array = _halves(d) * ((low | (high << 4)).astype(np.float32) - np.float32(32))
    return scales


def _q3_k(raw: Array) -> Unpacked:
    scales = _signed_scales(raw[:, 108:], _nibbles(raw[:, 96:104], 8), _planes(raw[:, 104:108], 2, 4))
    return _planes(raw[:, 32:96], 2, 32) | (_planes(raw[:, :32], 1, 32) << 2), scales, None


def _q6_k(raw: Array) -> Unpacked:
    scales = np.ascontiguousarray(raw[:, 192:208]).view(np.int8).astype(np.float32)
    return _nibbles(raw[:, :128], 64) | (_planes(raw[:, 128:192], 2, 32) << 4), _halves(raw[:, 208:]) * scales, None


def _iq4_nl(raw: Array) -> Unpacked:
    return _coded(_nibbles(raw[:, 2:], 16), _IQ4_NL, zero=128), _halves(raw[:, :2]), None


def _iq4_xs(raw: Array) -> Unpacked:
    scales = _signed_scales(raw[:, :2], _nibbles(raw[:, 4:8], 1), _planes(raw[:, 2:4], 2, 1))
    return _coded(_nibbles(raw[:, 8:], 16), _IQ4_NL, zero=128), scales, None


def _mxfp4(raw: Array) -> Unpacked:
    scale = np.ldexp(np.float32(1), raw[:, :1].astype(np.int32) - _MXFP4_BIAS)
    return _coded(_nibbles(raw[:, 1:], 16), _MXFP4, zero=12), scale, None


def _coded(codes: Array, values: tuple[int, ...], zero: int) -> Array:
    table: Array = (np.array(values) + zero).astype(np.uint8)
    return np.take(table, codes)


_TYPES: Mapping[GGMLQuantizationType, tuple[Form, Callable[[Array], Unpacked]]] = {
    GGMLQuantizationType[form.kind]: (form, take_apart)
    for form, take_apart in (
        (Form("Q4_0", bits=4, zero=8, size=32), _q4_0),
        (Form("Q4_1", bits=4, zero=0, size=32, minima=True), _q4_1),
        (Form("Q5_0", bits=5, zero=16, size=32), _q5_0),
        (Form("Q5_1", bits=5, zero=0, size=32, minima=True), _q5_1),
        (Form("Q8_0", bits=8, zero=128, size=32), _q8_0),
        (Form("Q2_K", bits=2, zero=0, size=16, minima=True), _q2_k),
        (Form("Q3_K", bits=3, zero=4, size=16), _q3_k),
        (Form("Q4_K", bits=4, zero=0, size=32, minima=True), _q4_k),
        (Form("Q5_K", bits=5, zero=0, size=32, minima=True), _q5_k),
        (Form("Q6_K", bits=6, zero=32, size=16), _q6_k),
        (Form("IQ4_NL", bits=8, zero=128, size=32), _iq4_nl),
        (Form("IQ4_XS", bits=8, zero=128, size=32), _iq4_xs),
        (Form("MXFP4", bits=5, zero=12, size=32), _mxfp4),
    )
}
