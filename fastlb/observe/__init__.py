"""What a running balancer tells about itself, as values that JSON can hold and as sentences.

status.py has counters, services and backends; flows.py the flows that there are; trace.py, explanation.py and
explain_*.py say where a packet goes, and why. flow_log.py writes a line for each flow, log.py sets up the program's own
log, and changes.py says what stands there when many backends change at once.
"""
