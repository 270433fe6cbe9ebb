"""Trim: keep the tokens that some texts use, and cut tokenizer, embedding and output head down to them.

On what is kept nothing changes, tokens or numbers (students/trimming.py, docs/trim.md). A small model's head is a large
part of every step: SmolLM2 reads a fifth of its weights to give logits for 49,152 tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from edgepipe.artifacts import Context, Json, TorchModel
from edgepipe.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Trim:
    """Options of the stage `trim`."""

    data: str = ""  # a text, .tsv, .csv or .jsonl file (all its texts count), or the name of a shipped text
    size: int = 0  # tokens kept at most, the most frequent first; 0: every token that the data uses
    characters: bool = True  # keep every single character of a tokenizer without bytes: fewer unknown words elsewhere

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if self.size < 0:
            raise ConfigError(f"trim.size: expected a number of tokens, 0 for all that are used, got {self.size}")

    def check(self, model: TorchModel) -> None:
        """Refuse a model that can't be trimmed, and data that can't be read."""
        from edgepipe.students.trimming import check_trimmable

        check_trimmable(model)
        self._texts()

    def reads(self) -> Json:
        """Return the contents this stage depends on besides the model: its key changes with them."""
        from edgepipe.rows import open_data

        return {"data": open_data(self.data, "trimming").sha256}

    def __call__(self, model: TorchModel, ctx: Context) -> TorchModel:
        """Return the model with fewer tokens; rows are copied when they are read."""
        from edgepipe.students.trimming import trim

        ctx.progress("counting tokens", 0, 1)
        trimmed, kept = trim(model, self._texts(), self.size or None, characters=self.characters)
        ctx.note(
            f"kept {len(kept.old_ids):,} of {kept.rows_before:,} tokens, {kept.permanent:,} of them whatever the data "
            f"uses: {100 * kept.coverage:.2f} % of the data's {kept.tokens_before:,} tokens"
        )
        ctx.note(
            f"tokens per word of the data: {kept.tokens_before / kept.words:.3f} before, "
            f"{kept.tokens_after / kept.words:.3f} after"
        )
        figures = {"tokens": len(kept.old_ids), "tokens_before": kept.rows_before, "coverage": kept.coverage}
        words = {"per_word": kept.tokens_after / kept.words, "per_word_before": kept.tokens_before / kept.words}
        ctx.figures({**figures, **words})
        return trimmed

    def _texts(self) -> list[str]:
        from edgepipe.rows import open_data, read_texts

        if not self.data:
            raise ConfigError("trim.data: expected a file whose texts say which tokens are kept (--trim-vocab FILE)")
        return read_texts(open_data(self.data, "trimming"))
