"""What was done and what ran: records kept while compiling, and the table, page and JSON made of them."""
