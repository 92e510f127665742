"""A process of two: audits the noise of a run whose ranks share one noise key, or do not."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import pytest
import torch.distributed as dist
from distributed.launch import leave

from auditing.faults import one_noise_key_for_all_ranks
from auditing.toy import effort, toy_run
from dp_trainer.audit.run import audit


def main(result: Path, plant: bool) -> None:
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        if plant:
            one_noise_key_for_all_ranks(patch)
        report = audit(
            toy_run(folder),
            effort(audit_layers=["exact"], audit_draws=100, audit_noise_entries=160_000),
            quiet=True,
        )
    if dist.get_rank() == 0:
        result.write_text("\n".join(report.contradictions), encoding="utf-8")
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] == "plant")
