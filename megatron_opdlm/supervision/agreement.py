"""What one rank finds out locally and all must know before the next collective: a rank that raised
alone would leave the others waiting for it.
"""

import torch.distributed as dist


def first_problem(problem: str | None) -> str | None:
    """The problem of the first rank that has one, on every rank (all call it); it names that rank
    where there are several. None: there is none.
    """
    if dist.get_world_size() == 1:
        return problem
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    for rank, found in enumerate(problems):
        if found is not None:
            return f"rank {rank}: {found}" if rank else found
    return None
