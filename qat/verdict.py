"""What verification found: figures, differences, and what could not be checked."""

from dataclasses import dataclass, field
from typing import Any

from qat.errors import VerifyError

NOT_RUN = "not run: "  # how a line of `unchecked` about a runtime that could not be started begins


@dataclass
class Verdict:
    """figures: the report's entry for this export. differences: what is wrong, the first thing first. unchecked:
    what could not be checked, and why."""

    target: str
    figures: dict[str, Any] = field(default_factory=dict)
    differences: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)

    def raise_if_different(self) -> None:
        """Raises VerifyError naming the first tensor that differs."""
        if self.differences:
            more = f" (and {len(self.differences) - 1} more)" if len(self.differences) > 1 else ""
            raise VerifyError(self.differences[0] + more)

    def lines(self) -> list[str]:
        """What was found, a line each, for the terminal."""
        f = self.figures
        out = [f"  WRONG: {d}" for d in self.differences]
        if "codes_equal" in f:
            out.append(
                f"  codes and stored scales equal: {f['codes_equal']}, float32 weights equal: {f['weights_equal']}"
            )
        if "worst_sqnr" in f:
            out.append(
                f"  quantized weights against the float original: {f['mean_sqnr']:.1f} dB SQNR on average, "
                f"{f['worst_sqnr']:.1f} dB at worst ({f['worst']})"
            )
        if "tokenizer_lines" in f and not self.differences:
            out.append(f"  tokenizer equal on {f['tokenizer_lines']} lines")
        if "runtime" in f:
            quality = f"perplexity {f['perplexity']:.4f}" if "perplexity" in f else f"accuracy {f['accuracy']:.4f}"
            out.append(
                f"  {f['runtime']}: loss {f['loss']:.6f} ({f['loss_diff']:+.6f} from the trained model's), {quality}, "
                f"largest difference {f['max_logit_diff']:.2g}"
            )
        return out + [f"  {'' if u.startswith(NOT_RUN) else 'not checked: '}{u}" for u in self.unchecked]
