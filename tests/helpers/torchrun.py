"""Commands in two processes of torchrun, which end with the test, whatever they wait for."""

import os
import signal
import subprocess
import sys

LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def run_twice(*arguments, timeout=200):
    """Run `python -m ARGUMENTS` in two processes, which must succeed in `timeout` seconds.

    The ranks hold the pipes of the launcher. All are in one session, which is killed in the end.
    """
    command = [*LAUNCHER, "-m", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, start_new_session=True, **pipes) as process:
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise AssertionError(f"no end in {timeout} s: {process.communicate()[0]}") from None
    assert process.returncode == 0, output
    return output
