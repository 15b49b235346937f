"""What a corpus costs before it is touched: `hhnet plan --cost`.

requests  requests of each verb to a store, as docs/scale.md says them
model     constants, and the sums that make bytes, hours and a price of them
records   constants that the run records and parts of finished artifacts tell
estimate  `hhnet plan --cost`
"""
