"""What a program of this kind needs, mixtures or not.

A class is a frozen dataclass that JAX sees as a pytree (`tree`). How a solver ended is a status, whose text names the remedy
(`status`). A bad argument is refused before anything compiles, with its name and the remedy (`checks`, `foreign`, `errors`).
Points lie in chunks of two lengths, x = (chunks, d, rows), so that clouds of any size share few programs (`chunks`), which a
process gives back before it has no room for more (`programs`). What is asked of every point is asked chunk by chunk where a cloud
is not in memory (`passes`); one may lie on several devices, of which each sums what it has (`meshes`).

Where is a small matrix factored? `matrices`. Where are differences that cancel taken? `expansions`. How do rows of a running
program reach a listener? `report`; how are they shown? `progress`. What does a program ask the host? `host`. Who ends a command
by Ctrl-C? `interrupts`. What is said where a library
is not installed? `installation`.
"""
