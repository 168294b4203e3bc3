"""Many problems at once: what one call would do for each of them, in few compiled programs, here or where an executor has workers.

Where is all of a cohort's distances? `distances`. Who does the work, and what if a worker dies? `executors`.
"""
