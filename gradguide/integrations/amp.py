"""Train with mixed precision and a GradScaler: a recipe, without code to import.

The result is the same with and without ``scaler.unscale_``. A step that overflows changes nothing::

    # recipe: amp.py
    import torch

    from gradguide import GradGuide

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = torch.nn.Linear(4, 3).to(device)
    optimizer = GradGuide(torch.optim.AdamW(model.parameters(), lr=1e-3))
    scaler = torch.amp.GradScaler(device)

    for _ in range(4):
        x, y = torch.randn(8, 4, device=device), torch.randint(3, (8,), device=device)
        with torch.autocast(device, dtype=torch.float16 if device == "cuda" else torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)  # with or without scaler.unscale_(optimizer) before it; an overflow changes nothing
        scaler.update()
        optimizer.zero_grad()
    print(optimizer.metrics()["grad_norm"])
"""
