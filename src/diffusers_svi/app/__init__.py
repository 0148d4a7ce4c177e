"""The page: films made in a browser, in a folder from which each can go on. Needs the extra `app`."""
