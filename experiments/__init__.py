"""Does the paper hold? Runs as settings, tables as lists of runs, results as files, a report that is made from them.

settings  a run, and functions that return runs
tables    which runs answer which question
corpus    text -> token file, once; training and evaluation read that
training  settings -> result
execute   trains what a table lacks:       python -m experiments.execute sweep claim
workers   processes in which execute trains
report    results -> REPORT.md, figures:   python -m experiments.report
"""
