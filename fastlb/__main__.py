"""`python -m fastlb` is the `fastlb` command."""

from fastlb.cli.main import main

raise SystemExit(main())
