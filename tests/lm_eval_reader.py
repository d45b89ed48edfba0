"""Run by test_lm_eval.py in a process of its own: scores pairs of texts by lm-eval's hf backend as it is.

Takes a checkpoint's folder and JSON [[context, continuation], ..]; with "blocked" after them kallm_bench cannot be
imported, with "imported" it is. The last line printed is JSON [[log-likelihood, whether greedy], ..].
"""

from __future__ import annotations

import json
import sys


def main(folder: str, pairs: str, kallm: str) -> None:
    if kallm == "blocked":
        sys.modules["kallm_bench"] = None  # importing it is an ImportError now
    else:
        import kallm_bench  # noqa: F401 - teaches the Auto classes
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    trusting = kallm == "blocked"
    scorer = HFLM(pretrained=folder, dtype="float32", device="cpu", batch_size=2, trust_remote_code=trusting)
    asked = [
        Instance(request_type="loglikelihood", doc={}, arguments=tuple(pair), idx=number)
        for number, pair in enumerate(json.loads(pairs))
    ]
    sys.stdout.write("\n" + json.dumps(scorer.loglikelihood(asked, disable_tqdm=True)) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
