"""Naive twins: what edgepipe's numerics must compute, written as plain loops over one element at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgepipe.artifacts import QuantizedTensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounded:
    """Hold what rounding one matrix gives, one code per byte, rows padded to whole groups."""

    codes: np.ndarray  # [out, groups · group] uint8
    scale: np.ndarray  # [out, groups] float16
    zero_points: np.ndarray  # [out, groups] uint8


def round_naively(weight: np.ndarray, bits: int, group: int, symmetric: bool) -> Rounded:
    """Round a matrix [out, in] to nearest, group by group of one row."""
    rows, columns = weight.shape
    groups = (columns + group - 1) // group
    codes = np.zeros((rows, groups * group), np.uint8)
    scale = np.zeros((rows, groups), np.float16)
    zero_points = np.zeros((rows, groups), np.uint8)
    for row in range(rows):
        for g in range(groups):
            values = [np.float32(0)] * group
            for i in range(group):
                if g * group + i < columns:
                    values[i] = np.float32(weight[row, g * group + i])
            one = _symmetric(values, bits) if symmetric else _asymmetric(values, bits)
            scale[row, g], zero_points[row, g] = one
            for i in range(group):
                code = int(np.rint(values[i] / np.float32(scale[row, g]))) + int(zero_points[row, g])
                codes[row, g * group + i] = min(max(code, 0), 2**bits - 1)
    return Rounded(codes=codes, scale=scale, zero_points=zero_points)


def _symmetric(values: list[np.float32], bits: int) -> tuple[np.float16, int]:
    """The element of the largest magnitude, with its sign, lies on code 0; a tie goes to the negative one."""
    extreme = np.float32(0)
    for value in values:
        if abs(value) > abs(extreme) or (abs(value) == abs(extreme) and value < 0):
            extreme = value
    return _half(extreme / np.float32(-(2 ** (bits - 1)))), 2 ** (bits - 1)


def _asymmetric(values: list[np.float32], bits: int) -> tuple[np.float16, int]:
    """The codes reach from the smallest to the largest element, zero among them."""
    low, high = min(np.float32(0), *values), max(np.float32(0), *values)
    scale = _half((high - low) / np.float32(2**bits - 1))
    return scale, min(max(int(np.rint(-low / np.float32(scale))), 0), 2**bits - 1)


def _half(scale: np.float32) -> np.float16:
    """Round a scale to a float16 that has all its digits: its magnitude is 2^-14 at least and 65504 at most."""
    if scale == 0:
        return np.float16(1)
    magnitude = min(max(abs(float(scale)), 2.0**-20), 65504.0)
    return np.float16(magnitude if scale > 0 else -magnitude)


def pack_naively(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack codes [rows, n] into bytes: element 2i is the low nibble of byte i, element 2i + 1 the high one."""
    rows, n = codes.shape
    packed = np.zeros((rows, n * bits // 8), np.uint8)
    for row in range(rows):
        for i in range(n):
            packed[row, i * bits // 8] |= int(codes[row, i]) << (i * bits % 8)
    return packed


def unpack_naively(packed: np.ndarray, bits: int) -> np.ndarray:
    """Read code after code of `bits` bits from bytes [rows, m]."""
    rows, m = packed.shape
    codes = np.zeros((rows, m * 8 // bits), np.uint8)
    for row in range(rows):
        for i in range(codes.shape[1]):
            codes[row, i] = (int(packed[row, i * bits // 8]) >> (i * bits % 8)) & (2**bits - 1)
    return codes


def decode_naively(tensor: QuantizedTensor) -> np.ndarray:
    """Decode element by element as QuantizedTensor's docstring says, in float32. → [out, in]"""
    rows, columns = tensor.shape
    codes = unpack_naively(tensor.codes, tensor.bits)
    value = np.zeros((rows, columns), np.float32)
    for row in range(rows):
        for i in range(columns):
            g = i // tensor.group
            code, scale = np.float32(codes[row, i]), np.float32(tensor.scale[row, g])
            if tensor.minima is not None:
                value[row, i] = scale * code + np.float32(tensor.minima[row, g])
            elif tensor.zero_points is not None:
                value[row, i] = scale * (code - np.float32(tensor.zero_points[row, g]))
            else:
                value[row, i] = scale * (code - np.float32(2 ** (tensor.bits - 1)))
    return value


def product_by_group_sums(x: np.ndarray, tensor: QuantizedTensor) -> np.ndarray:
    """Multiply x [n, in] by a weight with minima as the lowering does: symmetric codes, and group sums of x.

    Σ x·(s·q + m) = Σ x·s·(q − 2^(b−1)) + Σ_groups (Σ x in the group) · (m + 2^(b−1)·s)            → [n, out] float64
    """
    assert tensor.minima is not None
    rows, columns = tensor.shape
    middle = 2 ** (tensor.bits - 1)
    codes = unpack_naively(tensor.codes, tensor.bits)
    y = np.zeros((len(x), rows))
    for n in range(len(x)):
        for row in range(rows):
            for g in range(tensor.groups):
                scale, minimum = float(tensor.scale[row, g]), float(tensor.minima[row, g])
                group_sum = 0.0
                for i in range(g * tensor.group, min((g + 1) * tensor.group, columns)):
                    y[n, row] += float(x[n, i]) * scale * (int(codes[row, i]) - middle)
                    group_sum += float(x[n, i])
                y[n, row] += group_sum * (minimum + middle * scale)
    return y


def windows_naively(ids: list[int], window: int, stride: int) -> list[tuple[list[int], int]]:
    """Cut a text as docs/evaluate.md says: window after window, each scoring what none before it scored."""
    found = []
    scored: set[int] = set()
    start = 0
    while True:
        places = range(start, min(start + window, len(ids)))
        new = [place for place in places if place > start and place not in scored]
        if new:
            found.append(([ids[place] for place in places], new[0] - start))
        scored |= {*places}
        if start + window >= len(ids):
            return found
        start += stride or window


def divergence_naively(
    ours: Callable[[tuple[int, ...]], np.ndarray],
    theirs: Callable[[tuple[int, ...]], np.ndarray],
    windows: Sequence[Any],
) -> tuple[list[float], list[bool], float, float]:
    """Return KL in nats and agreement of every scored token, and both sums of negative log-likelihoods."""
    kl, agreed, our_loss, their_loss = [], [], 0.0, 0.0
    for window in windows:
        q_rows, p_rows = (_softmax(logits(window.ids)) for logits in (ours, theirs))
        for place in range(window.first, len(window.ids)):
            q, p = q_rows[place - 1], p_rows[place - 1]
            kl.append(sum(float(b) * (math.log(b) - math.log(a)) for a, b in zip(q, p, strict=True) if b > 0))
            agreed.append(max(range(len(q)), key=q.__getitem__) == max(range(len(p)), key=p.__getitem__))
            our_loss -= math.log(q[window.ids[place]])
            their_loss -= math.log(p[window.ids[place]])
    return kl, agreed, our_loss, their_loss


def _softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    total: np.ndarray = weights / weights.sum(axis=-1, keepdims=True)
    return total


def spearman_naively(first: Sequence[float], second: Sequence[float]) -> float:
    """Return Pearson's correlation of ranks, where a rank is one more than how many are below, ties sharing alike."""

    def rank(values: Sequence[float]) -> list[float]:
        return [sum(v < x for v in values) + (1 + sum(v == x for v in values)) / 2 for x in values]

    a, b = rank(first), rank(second)
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    covariance = sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True))
    return covariance / math.sqrt(sum((x - mean_a) ** 2 for x in a) * sum((y - mean_b) ** 2 for y in b))


def bleu_naively(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return corpus BLEU-4, 0 to 100, of texts whose words are parted by spaces; smoothed as mteval-v13a does."""

    def grams(words: list[str], order: int) -> list[tuple[str, ...]]:
        return [tuple(words[i : i + order]) for i in range(len(words) - order + 1)]

    length = wanted_length = 0
    for answer, wanted in zip(answers, references, strict=True):
        length += len(answer.split())
        sizes = [len(one.split()) for one in wanted]
        wanted_length += min(sizes, key=lambda size: (abs(size - len(answer.split())), size))
    product, halving = 1.0, 1.0
    for order in range(1, 5):
        right = total = 0
        for answer, wanted in zip(answers, references, strict=True):
            found = grams(answer.split(), order)
            total += len(found)
            for gram in set(found):
                right += min(found.count(gram), max(grams(one.split(), order).count(gram) for one in wanted))
        if right == 0:
            halving /= 2
        product *= (right or halving) / total
    return 100 * min(1.0, math.exp(1 - wanted_length / length)) * product**0.25


def rouge_l_naively(answer: str, reference: str) -> float:
    """Return F1 of the longest common subsequence of words, by trying whether each word is in it or not."""

    def longest(a: tuple[str, ...], b: tuple[str, ...]) -> int:
        if not a or not b:
            return 0
        if a[0] == b[0]:
            return 1 + longest(a[1:], b[1:])
        return max(longest(a[1:], b), longest(a, b[1:]))

    a, b = tuple(answer.split()), tuple(reference.split())
    shared = longest(a, b)
    return 2 * shared / (len(a) + len(b))


def pooled(hidden: np.ndarray, mask: np.ndarray, pooling: str, *, normalize: bool) -> np.ndarray:
    """Pool hidden [rows, tokens, width] over the tokens where mask [rows, tokens] is 1, a row at a time."""
    rows = []
    for states, kept in zip(hidden.astype(np.float64), mask, strict=True):
        tokens = states[: int(kept.sum())]
        vector = {"mean": tokens.mean(0), "cls": tokens[0], "last": tokens[-1], "max": tokens.max(0)}[pooling]
        rows.append(vector / np.sqrt((vector**2).sum()) if normalize else vector)
    return np.stack(rows)


def softmax_naively(logits: np.ndarray, temperature: float) -> list[float]:
    """Return the probabilities of one position."""
    largest = max(float(x) / temperature for x in logits)
    weights = [math.exp(float(x) / temperature - largest) for x in logits]
    return [weight / sum(weights) for weight in weights]


def cross_entropy_naively(logits: np.ndarray, target: int) -> float:
    """Return −log p(target) at one position."""
    return -math.log(softmax_naively(logits, 1.0)[target])


def mixed_divergence_naively(p: Sequence[float], q: Sequence[float], reverse: float) -> float:
    """Return (1 − r) KL(p ‖ q) + r KL(q ‖ p)."""
    forward = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)
    backward = sum(b * math.log(b / a) for a, b in zip(p, q, strict=True) if b > 0)
    return (1 - reverse) * forward + reverse * backward


def teacher_divergence_naively(student: np.ndarray, teacher: np.ndarray, temperature: float, reverse: float) -> float:
    """Return T² times the mixed divergence at one position."""
    p, q = softmax_naively(teacher, temperature), softmax_naively(student, temperature)
    return temperature**2 * mixed_divergence_naively(p, q, reverse)


def bucketed_naively(student: np.ndarray, teacher: np.ndarray, k: int, temperature: float, reverse: float) -> float:
    """Return the same over the teacher's k likeliest tokens and a bucket of all others."""
    p, q = softmax_naively(teacher, temperature), softmax_naively(student, temperature)
    kept = sorted(range(len(p)), key=lambda i: -p[i])[:k]
    events = [[x[i] for i in kept] for x in (p, q)]
    if k < len(p):
        events = [[*e, sum(v for i, v in enumerate(x) if i not in kept)] for e, x in zip(events, (p, q), strict=True)]
    return temperature**2 * mixed_divergence_naively(events[0], events[1], reverse)


def cosine_distance_naively(a: np.ndarray, b: np.ndarray) -> float:
    """Return 1 − a·b / (|a| |b|)."""
    dot = sum(float(x) * float(y) for x, y in zip(a, b, strict=True))
    lengths = math.sqrt(sum(float(x) ** 2 for x in a)) * math.sqrt(sum(float(y) ** 2 for y in b))
    return 1 - dot / lengths


def attention_naively(q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray, scale: float) -> np.ndarray:
    """Attend from q [B, heads, S, D] to k, v [B, key heads, N, D] where mask [B, N] is 1, row by row. → q's shape"""
    y = np.zeros(q.shape, np.float64)
    for b, h, s in np.ndindex(q.shape[:3]):
        shared = h // (q.shape[1] // k.shape[1])  # neighbouring heads share keys and values
        seen = [n for n in range(k.shape[2]) if mask[b, n]]
        scores = [sum(float(q[b, h, s, d]) * float(k[b, shared, n, d]) for d in range(q.shape[3])) for n in seen]
        weights = [math.exp(scale * (score - max(scores))) for score in scores]
        for weight, n in zip(weights, seen, strict=True):
            y[b, h, s] += weight / sum(weights) * v[b, shared, n]
    return y


def coded_naively(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Round keys or values [kv_heads, tokens, head_dim] to codes of scale [kv_heads, 1, head_dim], one by one."""
    codes = np.zeros(x.shape, np.int64)
    for h, t, d in np.ndindex(*x.shape):
        codes[h, t, d] = min(max(round(float(x[h, t, d] / scale[h, 0, d])), -128), 127)
    return codes


def choice_scores_naively(logits: Sequence[float], choices: Sequence[int]) -> list[float]:
    """Return log p of each choice among the choices, from the logits of a whole vocabulary."""
    total = sum(math.exp(logits[choice]) for choice in choices)
    return [math.log(math.exp(logits[choice]) / total) for choice in choices]


def gptq_naively(weight: np.ndarray, gram: np.ndarray, bits: int, group: int, symmetric: bool) -> np.ndarray:
    """Round column by column; after each, the columns behind it move by the optimal brain surgeon's formula. → values

    The inverse of the gram matrix of the columns that are left is computed anew for each one, which Cholesky's factor
    has in its rows. float64 throughout, but for the scales.
    """
    values = weight.astype(np.float64)
    rows, columns = values.shape
    damped = gram.astype(np.float64).copy()
    for i in range(columns):
        if damped[i, i] == 0:
            damped[i, i] = 1
    damped += 0.01 * np.mean(np.diag(damped)) * np.eye(columns)
    points = np.zeros_like(values)
    for i in range(columns):
        if i % group == 0:
            rounded = round_naively(values[:, i : i + group].astype(np.float32), bits, group, symmetric)
        inverse = np.linalg.inv(damped[i:, i:])
        for row in range(rows):
            scale, zero = float(rounded.scale[row, 0]), int(rounded.zero_points[row, 0])
            code = min(max(int(np.rint(values[row, i] / scale)) + zero, 0), 2**bits - 1)
            points[row, i] = scale * (code - zero)
            error = (values[row, i] - points[row, i]) / inverse[0, 0]
            for j in range(i + 1, columns):
                values[row, j] -= error * inverse[0, j - i]
    return points


def lost_naively(error: np.ndarray, inputs: np.ndarray) -> float:
    """Return the mean over inputs [n, in] of the squared error [out, in] of the outputs, summed over them."""
    total = 0.0
    for x in inputs.astype(np.float64):
        for row in error.astype(np.float64):
            total += float(np.dot(row, x)) ** 2
    return total / len(inputs)


def cut_naively(weight: np.ndarray, gram: np.ndarray, bits: int, group: int, symmetric: bool) -> np.ndarray:
    """Try eleven ranges for every group, and keep what loses least on the inputs it meets. → values [out, in]"""
    rows, columns = weight.shape
    values = np.zeros((rows, columns))
    for row in range(rows):
        for start in range(0, columns, group):
            part = weight[row : row + 1, start : start + group].astype(np.float32)
            local = gram[start : start + group, start : start + group].astype(np.float64)
            least = math.inf
            for ratio in np.linspace(1, 0.5, 11).astype(np.float32):
                low, high = min(part.min(), np.float32(0)) * ratio, max(part.max(), np.float32(0)) * ratio
                grid = round_naively(np.clip(part, low, high), bits, group, symmetric)
                scale, zero = float(grid.scale[0, 0]), int(grid.zero_points[0, 0])
                points = [
                    scale * (min(max(int(np.rint(float(w) / scale)) + zero, 0), 2**bits - 1) - zero) for w in part[0]
                ]
                error = np.array(points) - part[0]
                lost = float(error @ local @ error)
                if lost < least * (1 - 1e-6):
                    least, values[row, start : start + group] = lost, points
    return values


def integer_product_naively(
    x: np.ndarray,
    weight: QuantizedTensor,
    bias: np.ndarray | None = None,
    observed: tuple[float, float] | None = None,
) -> np.ndarray:
    """Multiply x [..., in] by a matrix with one scale a row, both in 8 bits: sums of integers, scaled once at the end.

    x is rounded to uint8 within the range `observed`, or its own where there is none. → [..., out] float64
    """
    rows = x.reshape(-1, x.shape[-1]).astype(np.float32)
    if weight.column_scale is not None:
        rows = rows * weight.column_scale.astype(np.float32)
    low, high = (float(rows.min()), float(rows.max())) if observed is None else observed
    low, high = min(low, 0.0), max(high, 0.0)
    step = np.float32(max((high - low) / 255, 1e-10))
    zero = min(max(int(np.rint(np.float32(-low) / step)), 0), 255)
    out = np.zeros((len(rows), weight.shape[0]))
    for r, row in enumerate(rows):
        codes = [min(max(int(np.rint(value / step)) + zero, 0), 255) for value in row]
        for o in range(weight.shape[0]):
            total = sum((code - zero) * (int(w) - 128) for code, w in zip(codes, weight.codes[o], strict=True))
            out[r, o] = total * float(step) * float(weight.scale[o, 0])
    return (out if bias is None else out + bias).reshape(*x.shape[:-1], weight.shape[0])


def column_scales_naively(activations: np.ndarray, weights: Sequence[np.ndarray], alpha: float) -> np.ndarray:
    """Return 1/s for every channel j, s = max|x_j|^α / max|w_j|^(1−α) over all the matrices that read it."""
    scales = np.ones(len(activations), np.float16)
    for j, reached in enumerate(activations):
        largest = max(abs(float(w[o, j])) for w in weights for o in range(len(w)))
        if reached > 0 and largest > 0:
            factor = max(float(reached), 1e-5) ** alpha / max(largest, 1e-5) ** (1 - alpha)
            scales[j] = min(max(1 / factor, 2.0**-12), 2.0**12)
    return scales


def round_token_naively(values: Sequence[float], bits: int, form: str) -> tuple[list[int], np.float32]:
    """Return the levels and the scale of one token's values."""
    x = [np.float32(value) for value in values]
    half, top = 2 ** (bits - 1), 2**bits - 1
    low, high = min(x), max(x)
    zero = half
    if form == "zero points":
        low, high = min(low, np.float32(0)), max(high, np.float32(0))
        scale = np.float32((high - low) / np.float32(top))
        zero = int(np.rint(-low / scale)) if scale >= 1e-20 else 0
    else:
        extreme = high if high > -low else low
        scale = extreme / np.float32(-half) if form == "signed" else abs(extreme) / np.float32(half - 1)
    if abs(scale) < 1e-20:
        scale = np.float32(1)
    return [min(max(int(np.rint(value / scale)), -zero), top - zero) for value in x], scale


def ternary_naively(weight: np.ndarray, measure: str) -> tuple[np.ndarray, np.float16]:
    """Return −1, 0, 1 for every weight, and the scale of the matrix."""
    magnitudes = sorted(abs(float(value)) for value in weight.ravel())
    middle = magnitudes[(len(magnitudes) - 1) // 2]
    measured = middle if measure == "median" else math.fsum(magnitudes) / len(magnitudes)
    scale = np.float16(np.float32(min(max(measured, 1e-5), 65504.0)))
    levels = np.zeros(weight.shape, np.int64)
    for place, value in np.ndenumerate(weight):
        levels[place] = min(max(int(np.rint(np.float32(value) / np.float32(scale))), -1), 1)
    return levels, scale


def masked_naively(scores: np.ndarray, share: float, kept: int, of: int) -> np.ndarray:
    """Return which weights stay, row by row: the `kept` largest of every `of`, or all but a share of the row."""
    mask = np.zeros(scores.shape, bool)
    for row, values in enumerate(scores):
        width = of or len(values)
        stay = kept if of else len(values) - round(share * len(values))
        for start in range(0, len(values), width):
            places = sorted(range(start, start + width), key=lambda i: (-values[i], i))
            mask[row, places[:stay]] = True
    return mask


def sparsegpt_naively(weight: np.ndarray, gram: np.ndarray, kept: int, of: int) -> np.ndarray:
    """Remove column by column by the optimal brain surgeon's formula, the inverse computed anew each time. → values"""
    values = weight.astype(np.float64)
    rows, columns = values.shape
    damped = gram.astype(np.float64) + 0.01 * np.mean(np.diag(gram)) * np.eye(columns)
    pivots = [np.linalg.inv(damped[i:, i:])[0, 0] for i in range(columns)]
    alive = np.ones(values.shape, bool)
    for i in range(columns):
        if i % of == 0:
            scores = np.stack([values[:, j] ** 2 / pivots[j] for j in range(i, i + of)], 1)
            alive[:, i : i + of] = masked_naively(scores, 0.0, kept, of)
        inverse = np.linalg.inv(damped[i:, i:])
        for row in range(rows):
            if not alive[row, i]:
                error = values[row, i] / inverse[0, 0]
                for j in range(i, columns):
                    values[row, j] -= error * inverse[0, j - i]
                values[row, i] = 0
    return values
