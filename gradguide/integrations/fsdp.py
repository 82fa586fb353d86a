"""Train with FSDP2 and a captured source: a recipe, without code to import.

Run it with ``torchrun --nproc-per-node 2 fsdp.py``::

    # recipe: fsdp.py
    import torch
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from torch.nn.functional import cross_entropy

    from gradguide import Alignment, GradGuide, SourceGradient

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    if device == "cuda":
        torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3)).to(device)
    fully_shard(model)

    torch.manual_seed(dist.get_rank())  # each rank has its own rows
    old = [(torch.randn(2, 5, device=device), torch.randint(3, (2,), device=device)) for _ in range(8)]
    source = SourceGradient.capture(model, old, lambda model, batch: cross_entropy(model(batch[0]), batch[1]))
    optimizer = GradGuide(
        torch.optim.AdamW(model.parameters(), lr=1e-2),
        alignment=Alignment(source.anchored()),
        names=model.named_parameters(),
    )
    for _ in range(5):
        optimizer.zero_grad()
        cross_entropy(model(torch.randn(8, 5, device=device)), torch.randint(3, (8,), device=device)).backward()
        optimizer.step()
    if dist.get_rank() == 0:
        print(optimizer.metrics()["guided_norm"])  # no collective: one rank may read it alone
    dist.destroy_process_group()
"""
