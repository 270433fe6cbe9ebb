"""Rewrite a GGUF file as Q4_0 with llama.cpp's own quantizer: `… llamacpp_requantize IN OUT`.

The layers become Q4_0, which its kernels repack for this processor; the embedding, which is the head too, stays Q8_0.
"""

from __future__ import annotations

import sys


def main(source: str, target: str) -> None:
    """Quantize, or end with llama.cpp's code."""
    import llama_cpp as lc

    parameters = lc.llama_model_quantize_default_params()
    parameters.ftype = lc.LLAMA_FTYPE_MOSTLY_Q4_0
    parameters.token_embedding_type = parameters.output_tensor_type = lc.GGML_TYPE_Q8_0
    parameters.allow_requantize = True
    if (code := lc.llama_model_quantize(source.encode(), target.encode(), parameters)) != 0:
        raise SystemExit(f"llama_model_quantize returned {code}")


if __name__ == "__main__":
    main(*sys.argv[1:])
