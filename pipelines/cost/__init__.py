"""What a corpus costs before it is touched: `hhnet plan --cost`.

model     constants, and the sums that make requests, bytes, hours and a price of them
records   constants that the run records and parts of finished artifacts tell
estimate  `hhnet plan --cost`
"""
