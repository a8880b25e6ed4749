"""The MLflow runs under which a sweep's runs are listed."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from lightning_hyper.sweep.plan import Job, SweepError
from lightning_hyper.tracking import close_abandoned, database, first_line, open_experiment


class Parents:
    """The parent runs, one for each recipe; made before the children, so that these find the database ready.

    Args:
        tracking_uri: MLflow server; None for the database under the root.
        experiment: name of the MLflow experiment.
        root: folder of the runs.
        recipes: names of the recipes.

    Attributes:
        ids: MLflow id of each recipe's run.

    Raises:
        SweepError: MLflow cannot be used.
    """

    def __init__(self, tracking_uri: str | None, experiment: str, root: Path, recipes: Iterable[str]) -> None:
        try:
            self.client, self.experiment = open_experiment(tracking_uri or database(root), root, experiment)
            close_abandoned(self.client, root, self.experiment)
            self.ids = {recipe: self._open(recipe) for recipe in recipes}
        except Exception as error:  # MLflow's, its database's and the file system's, all for the same reason
            option = "--root" if tracking_uri is None else "--tracking-uri"
            raise SweepError(f"{option}: MLflow cannot be used there: {first_line(error)}") from error

    def _open(self, recipe: str) -> str:
        """Return the id of the recipe's parent run, set to running; an earlier sweep's is used again."""
        runs = self.client.search_runs([self.experiment], "tags.kind = 'sweep'", max_results=1000)
        for run in runs:
            if run.data.tags.get("recipe") == recipe:
                self.client.update_run(run.info.run_id, status="RUNNING")
                return str(run.info.run_id)
        tags = {"kind": "sweep", "recipe": recipe}
        return str(self.client.create_run(self.experiment, run_name=f"sweep {recipe}", tags=tags).info.run_id)

    def close(self, jobs: Sequence[Job]) -> None:
        """Set each parent to what became of its children."""
        for recipe, run_id in self.ids.items():
            mine = [job for job in jobs if job.recipe == recipe]
            failed = any(job.fault for job in mine)
            done = all(job.finished() for job in mine)
            try:
                self.client.set_terminated(run_id, "FAILED" if failed else "FINISHED" if done else "KILLED")
            except Exception as error:  # the runs themselves are safe, so the sweep's own answer stands
                print(f"MLflow: the parent run of {recipe} stays as it is: {error}".splitlines()[0], file=sys.stderr)
