"""Writes qat/assets/evaluation.jsonl: about 200 KB of held-out standard-library source, one file a line.

Run once, under the interpreter named in the model card; the result is committed so that figures reproduce under any
Python version. Files are whole, at most 30 KB, taken evenly over the sorted test split; the generated tables of
`encodings` are left out.
"""

import json
from pathlib import Path

from qat.data.stdlib import files, split_of
from qat.files import atomic_write

SIZE, LARGEST = 200_000, 30_000

if __name__ == "__main__":
    import sysconfig

    root = Path(sysconfig.get_path("stdlib"))
    found = [
        (n, t)
        for n, t in files(root)
        if split_of(n) == "test" and not n.startswith("encodings/") and 500 < len(t) <= LARGEST
    ]
    step = max(1, round(sum(len(t) for _, t in found) / SIZE))
    chosen = found[::step]
    lines = (json.dumps({"path": n, "text": t}, ensure_ascii=False) for n, t in chosen)
    out = Path(__file__).parent.parent / "qat" / "assets" / "evaluation.jsonl"
    atomic_write(out, "".join(line + "\n" for line in lines))
    print(f"{len(chosen)} of {len(found)} files, {out.stat().st_size:,} bytes")
