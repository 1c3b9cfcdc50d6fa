"""The two names of PyTorch that the engine needs and that have no public form.

torch._C._is_fwd_grad_enabled      tells the forward of an `autograd.Function` from `torch.no_grad`
torch._C._current_graph_task_id    tells a graph's backward from its forward
"""

import torch


def in_autograd_function() -> bool:
    """Return whether an autograd.Function's forward runs, such as a re-entrant checkpoint's.

    It switches both kinds of derivatives off.
    """
    is_off = not torch.is_grad_enabled() and not torch._C._is_fwd_grad_enabled()
    return is_off and not torch.is_inference_mode_enabled()


def in_backward() -> bool:
    """Return whether a graph's backward runs, where a checkpoint in it runs an op again.

    `torch.utils.checkpoint` reads the same number.
    """
    return torch._C._current_graph_task_id() != -1
