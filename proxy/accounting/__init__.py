"""What is counted of each request: receipts, the ledger, budgets and runs."""
