"""`kvferry bench pool`: the pool beside other stores and beside what memory and disk can do at most."""
