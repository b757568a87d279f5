"""Payloads of comparisons, as short names: the candidate that is better, and how much."""

A = {"better": 0, "worse": 1, "strength": 1}
A2 = {"better": 0, "worse": 1, "strength": 2}
B = {"better": 1, "worse": 0, "strength": 1}
B2 = {"better": 1, "worse": 0, "strength": 2}
TIE = {"tie": [0, 1]}
BOTH_BAD = {"both_bad": [0, 1]}
