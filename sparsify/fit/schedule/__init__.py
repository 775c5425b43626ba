"""The search for keep and token rates of every block for a target.

choose            a target -> a schedule
sensitivity       damage of fewer tokens and keys in each block
costs             cost of each block in MACs, and as measured
search            the schedule of least damage for a cost
sureness          how sure each schedule is of the calibration images
"""
