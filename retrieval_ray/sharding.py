"""FSDP2: a student whose weights, gradients and optimiser state are spread over all ranks.

For backbones that do not fit. A layer's weights are gathered when it computes and freed after; its
gradients are summed and spread again after each chunk's backward, since to sum them once a step each rank
would have to hold them all. The step is the same step: what a rank computes and what is summed do not change.
"""

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from retrieval_ray.ranks import world
from retrieval_ray.student import Student


def shard(student: Student, device: torch.device) -> None:
    """Spread a student over all ranks, layer by layer; alone in the world, only move it.

    student: on the CPU where it does not fit on the device: whole, it lies only there. Every rank calls this
    with the same weights. Afterwards it can be trained, checkpointed and evaluated, by all ranks together,
    but not saved: for that, load its weights into one that is whole.
    """
    if world()[1] == 1:
        student.model.to(device)
    else:
        mesh = init_device_mesh(device.type, (world()[1],))
        for module in (*_layers(student.model), student.model):
            # the root's too, which else lie whole after a pass without gradient: no checkpoint must see that
            whole = fully_shard(module, mesh=mesh, reshard_after_forward=True)
            whole.set_gradient_divide_factor(1.0)  # the sum, not the mean: a loss is of the whole batch
            whole.set_force_sum_reduction_for_comms(True)
    student.device = device


def _layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The backbone's layers: the list of modules that holds most parameters."""
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    return list(max(lists, key=lambda each: sum(p.numel() for p in each.parameters()), default=[]))
