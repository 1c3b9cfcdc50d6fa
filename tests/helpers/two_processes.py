"""Two gloo processes run cases one after the other and leave what failed in a file each."""

import datetime
import traceback

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

NOT_RUN = "not run: a case before it failed"


def run(modules, names, folder):
    """case -> what went wrong in either process, '' where nothing did.

    modules: names of modules that have `CASES`, name -> function of the rank.
    names: of the cases to run.
    """
    mp.spawn(_work, args=(modules, names, str(folder)), nprocs=2)
    first, second = (torch.load(folder / f"{rank}.pt") for rank in range(2))
    return {name: first[name] or second[name] for name in first}


def _work(rank, modules, names, folder):
    from importlib import import_module

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=60),
    )
    cases = {name: case for m in modules for name, case in import_module(m).CASES.items()}
    failed = dict.fromkeys(names, NOT_RUN)
    for name in names:
        torch.manual_seed(0)
        try:
            cases[name](rank)
            failed[name] = ""
        except Exception:
            failed[name] = traceback.format_exc()
            break
    torch.save(failed, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
