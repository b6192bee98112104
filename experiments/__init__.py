"""Does the paper hold? Runs as settings, tables as lists of runs, results as files, a report that is made from them.

settings  a run, and functions that return runs
tables    which runs answer which question
corpus    text -> token file, once; training and evaluation read that
training  settings -> result
execute   trains what a table lacks:       python -m experiments.execute sweep claim
workers   processes in which execute trains
report    results -> REPORT.md, figures:   python -m experiments.report

A section of the report is a module:

section_verdict    in short, and each claim of the paper beside what was found
section_setup      models, training, learning rates             of the tables sweep, trend-sweep
section_claim      Table A                                      claim
section_sizes      Table A over sizes, repeated text, zero-shot trend, larger
section_ablations  Table B                                      ablations
section_frontier   Table C                                      frontier
section_limits     what it cannot tell
"""
