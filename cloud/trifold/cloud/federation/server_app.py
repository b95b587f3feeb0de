"""The ServerApp: Flower starts it, with the folder of a run in its run config."""

from __future__ import annotations

import os
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from trifold.cloud.federation.folder import RunFolder
from trifold.cloud.federation.metrics import Log
from trifold.cloud.federation.pace import shorten
from trifold.cloud.federation.run import FederatedRun
from trifold.shared.errors import ConfigError, TrifoldError

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """The rounds that the run in `folder` of the run config has left."""
    shorten()
    given = context.run_config.get("folder")
    if not given:
        raise ConfigError("the run config names no folder: start runs with `trifold federate run`")
    folder = RunFolder.open(Path(str(given)))
    with folder.locked():
        log = Log(folder.path)
        log.write("begin", run=folder.name, flower_run=context.run_id, process=os.getpid())
        try:
            done = FederatedRun(folder, grid).run()
        except BaseException as error:
            reason = error.message if isinstance(error, TrifoldError) else f"{type(error).__name__}: {error}"
            log.write("failed", reason=reason)
            raise
        log.write("end", round=done.round)
