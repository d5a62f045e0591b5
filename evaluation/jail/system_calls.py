"""The system calls that a program may make, by what they are for: ``name:x86_64:arm64`` (``-``: the
architecture has none), from Linux' ``asm/unistd_64.h`` and ``asm-generic/unistd.h``.

Standard library only: read inside the jail.
"""


def _table(text: str) -> dict[str, tuple[int | None, int | None]]:
    rows = (entry.split(":") for entry in text.split())
    return {name: (_number(intel), _number(arm)) for name, intel, arm in rows}


def _number(text: str) -> int | None:
    return None if text == "-" else int(text)


# Memory, threads, the end.
MEMORY_AND_THREADS = _table("""
    read:0:63 write:1:64 futex:202:98 mmap:9:222 munmap:11:215 mprotect:10:226 mremap:25:216
    madvise:28:233 brk:12:214 msync:26:227 mincore:27:232 set_robust_list:273:99 rseq:334:293
    membarrier:324:283 sched_yield:24:124 getcpu:309:168 exit:60:93 exit_group:231:94
    restart_syscall:219:128 futex_waitv:449:449 getrandom:318:278
""")
# What is open already: files, pipes, pairs of streams.
DESCRIPTORS = _table("""
    close:3:57 close_range:436:436 dup:32:23 dup2:33:- dup3:292:24 pipe:22:- pipe2:293:59
    eventfd2:290:19 lseek:8:62 pread64:17:67 pwrite64:18:68 readv:19:65 writev:20:66
    preadv:295:69 pwritev:296:70 preadv2:327:286 pwritev2:328:287 fsync:74:82 fdatasync:75:83
    ftruncate:77:46 fallocate:285:47 fadvise64:221:223 readahead:187:213 flock:73:32 poll:7:-
    ppoll:271:73 select:23:- pselect6:270:72 epoll_create:213:- epoll_create1:291:20
    epoll_ctl:233:21 epoll_wait:232:- epoll_pwait:281:22 recvfrom:45:207 shutdown:48:210
    getsockopt:55:209 getsockname:51:204 getpeername:52:205
""")
# Files by name, without changing any.
LOOKING = _table("""
    fstat:5:80 stat:4:- lstat:6:- newfstatat:262:79 statx:332:291 access:21:- faccessat:269:48
    faccessat2:439:439 readlink:89:- readlinkat:267:78 getdents:78:- getdents64:217:61
    statfs:137:43 fstatfs:138:44 getcwd:79:17 chdir:80:49 fchdir:81:50 umask:95:166
    getxattr:191:8 lgetxattr:192:9 fgetxattr:193:10 listxattr:194:11 llistxattr:195:12
    flistxattr:196:13
""")
# Who and where this process is; its own limits.
SELF = _table("""
    getpid:39:172 gettid:186:178 getppid:110:173 getpgrp:111:- getuid:102:174 geteuid:107:175
    getgid:104:176 getegid:108:177 getresuid:118:148 getresgid:120:150 getgroups:115:158
    uname:63:160 sysinfo:99:179 times:100:153 getrusage:98:165 getrlimit:97:163
    setrlimit:160:164 wait4:61:260 waitid:247:95
""")
# Clocks, waiting, its own signals.
TIME_AND_SIGNALS = _table("""
    clock_gettime:228:113 clock_getres:229:114 clock_nanosleep:230:115 nanosleep:35:101
    gettimeofday:96:169 time:201:- alarm:37:- setitimer:38:103 getitimer:36:102 pause:34:-
    rt_sigaction:13:134 rt_sigprocmask:14:135 rt_sigreturn:15:139 rt_sigpending:127:136
    rt_sigtimedwait:128:137 rt_sigsuspend:130:133 sigaltstack:131:132
""")
# Files made, moved and removed.
NAMES = _table("""
    creat:85:- mkdir:83:- mkdirat:258:34 rmdir:84:- unlink:87:- unlinkat:263:35 rename:82:-
    renameat:264:38 renameat2:316:276 link:86:- linkat:265:37 symlink:88:- symlinkat:266:36
""")
# Modes, times and lengths, which Landlock does not guard.
MODES = _table("""
    chmod:90:- fchmod:91:52 fchmodat:268:53 truncate:76:45 utime:132:- utimes:235:-
    futimesat:261:- utimensat:280:88
""")
# Judged by their arguments.
JUDGED = _table("""
    clone:56:220 kill:62:129 tgkill:234:131 prlimit64:302:261 fcntl:72:25 ioctl:16:29
    prctl:157:167 socketpair:53:199 sendto:44:206 sched_getaffinity:204:123 getpgid:121:155
    getsid:124:156 open:2:- openat:257:56
""")
