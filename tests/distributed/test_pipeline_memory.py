"""What stages keep for backward is what the schedule says: passes in flight times what a pass keeps."""

from __future__ import annotations

import pytest

from megatron_adamba.blueprint.stages import StagePlan, equal_bounds, num_chunks
from megatron_adamba.engine.replay import replay

ARGUMENTS = {"pattern": "TMTMTMTM", "sampling": "full", "mamba_num_groups": 2}


@pytest.mark.parametrize(
    ("ranks", "layout", "micro_batches"),
    [(2, {"pp": 2}, 6), (4, {"pp": 4}, 6), (4, {"pp": 4}, 4), (2, {"pp": 2, "schedule": "dualpipev"}, 6)],
)
def test_peaks(workers, ranks, layout, micro_batches):
    arguments = {"arguments": ARGUMENTS, "micro_batches": micro_batches, **layout}
    found = workers(ranks).run("pipeline_jobs", "kept_activations", **arguments)
    schedule = layout.get("schedule", "1f1b")
    count = num_chunks(ranks, schedule)
    stages = StagePlan(ranks, schedule, equal_bounds(8, count))
    played = replay(stages, micro_batches, [1.0] * count, [2.0] * count)
    for rank, job in enumerate(found):
        passes = {int(number): size for number, size in job["passes"].items()}
        assert sum(played.peaks[rank].values()) == stages.in_flight(rank, micro_batches)
        wanted = sum(flight * passes[number] for number, flight in played.peaks[rank].items())
        assert wanted > 0
        # a pass frees what it kept while it goes back, and the next one may begin meanwhile: never more than one apart
        assert abs(job["most"] - wanted) <= 0.02 * wanted, (rank, job, wanted)
