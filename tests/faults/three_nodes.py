"""A run on a cluster of three nodes that come and go; run by test_three_nodes.py in a process of its own.

python tests/faults/three_nodes.py FOLDER: submits the folder's recipe.yaml, removes the node of one of two rollout
workers, adds it back, removes the learner's node while another one is there, and prints the times as JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from job_folder import trained_steps, wait_for
from ray.cluster_utils import Cluster
from ray.job_submission import JobSubmissionClient

from end_to_end.command_line import read_lines
from plait.engine.rendezvous import free_port

STEPS_A_PHASE = 3
STEP_SECONDS = 90.0


def main(folder: Path) -> None:
    dashboard = free_port()
    head = {"num_cpus": 2, "include_dashboard": True, "dashboard_port": dashboard, **own_port()}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        both = cluster.add_node(num_cpus=1, resources={"learn": 1, "roll": 1}, **own_port())
        lone = cluster.add_node(num_cpus=1, resources={"roll": 1}, **own_port())
        story = Story(cluster, folder, f"http://127.0.0.1:{dashboard}")
        print(json.dumps(story.tell(both, lone)))
    finally:
        cluster.shutdown()


def own_port() -> dict[str, Any]:
    """Of a node's agent, which starts jobs: without its port it ends, and the nodes here are one machine."""
    return {"dashboard_agent_listen_port": free_port()}


class Story:
    def __init__(self, cluster: Cluster, folder: Path, url: str) -> None:
        self.cluster, self.folder, self.url = cluster, folder, url
        self.run = folder / "runs" / "recipe"
        self.marks: dict[str, float] = {}

    def tell(self, both: Any, lone: Any) -> dict[str, Any]:
        """What happened when, in seconds. `both` has the learner and a rollout worker, `lone` the other one."""
        began = time.monotonic()
        client = JobSubmissionClient(self.url)
        # No working_dir: with three nodes on one machine, the folder it is unpacked to went away under the driver.
        job = client.submit_job(
            entrypoint=f"cd {self.folder} && {sys.executable} -m plait.launch train recipe.yaml "
            f"run.dir={self.run.parent} --insecure"
        )

        def said() -> str:
            return f"{client.get_job_status(job).value}: {client.get_job_logs(job)[-3000:]}"

        def begun() -> bool:
            assert not client.get_job_status(job).is_terminal(), said()
            return bool(trained_steps(self.run))

        def steps_more(n: int) -> float:
            """Median seconds of the next n steps, the one under way left out."""
            first = len(trained_steps(self.run))
            wait_for(lambda: len(trained_steps(self.run)) >= first + n + 1, STEP_SECONDS, said)
            return median(self.step_seconds()[first + 1 : first + n + 1])

        wait_for(begun, 200, said)
        found: dict[str, Any] = {"start": time.monotonic() - began}
        wait_for(lambda: self.serving() == 2, 60, said)
        found["step_with_two"] = steps_more(STEPS_A_PHASE)

        self.cluster.remove_node(lone)
        found["without_rollout_node"] = self.until_next_step(said)
        found["step_with_one"] = steps_more(STEPS_A_PHASE)

        self.cluster.add_node(num_cpus=1, resources={"roll": 1}, **own_port())
        back = time.monotonic()
        wait_for(lambda: self.serving() == 2, 120, said)
        found["rejoined"] = time.monotonic() - back
        found["step_with_two_again"] = steps_more(STEPS_A_PHASE)

        self.cluster.add_node(num_cpus=1, resources={"learn": 1, "roll": 1}, **own_port())
        self.cluster.remove_node(both)
        found["without_learner_node"] = self.until_next_step(said)

        wait_for(lambda: client.get_job_status(job).is_terminal(), 200, said)
        found["status"] = client.get_job_status(job).value
        found["log"] = said()
        found["steps"] = trained_steps(self.run)
        total = time.monotonic() - began - found["start"]
        found["effective"] = sum(self.step_seconds()) / total
        return found

    def until_next_step(self, said: Any) -> float:
        """Seconds until a step is finished that nobody had finished before."""
        since, most = time.monotonic(), max(trained_steps(self.run))
        wait_for(lambda: max(trained_steps(self.run), default=0) > most, 150, said)
        return time.monotonic() - since

    def step_seconds(self) -> list[float]:
        rows = read_lines(self.run / "metrics.jsonl")
        return [row["time/step"] for row in rows if "reward/mean" in row]

    def serving(self) -> int:
        """Rollout workers that take samples, as status.json has it."""
        status = json.loads((self.run / "status.json").read_text())
        return sum(row["state"] == "serves" for row in status.get("rollout_workers", ()))


if __name__ == "__main__":
    os.chdir(sys.argv[1])
    main(Path(sys.argv[1]))
