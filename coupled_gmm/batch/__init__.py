"""Many problems at once: what one call would do for each of them, in few compiled programs, here or where an executor has workers.

How are many pairs fitted? `pairs`. Many single mixtures? `mixtures`; those of the classes of a labelled cloud? `classes`. What do
these share? `stacks`: fits in `parts` of one shape, by `lanes`, runs of unequal length side by side. What are all distances of a
cohort? `distances`, in `tiles`. Who does the work, and what if a worker dies? `executors`.
"""
