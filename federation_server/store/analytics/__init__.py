"""What neurons reported, over time.

ingest       points and events, as reports bring them
rollups      points added up by minute, hour and day
query        one metric over time, in series; `statements` has its SQL
names        which metrics there are
events       what neurons noted
"""
