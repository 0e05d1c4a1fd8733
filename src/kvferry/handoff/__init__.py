"""insert and drop_select: the protocol run over the transfer engine, and the tie of an instance to its router."""
