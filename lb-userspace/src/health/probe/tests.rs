//! Real sockets on loopback, one misbehaviour each.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::*;

const V4: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const V6: IpAddr = IpAddr::V6(Ipv6Addr::LOCALHOST);
/// Far above any probe's real duration on loopback, far below a test's patience.
const TIMEOUT: Duration = Duration::from_secs(5);

fn check(kind: CheckKind, port: u16, timeout: Duration) -> Check {
    Check { kind, port, at_own_port: true, interval: Duration::from_secs(2), timeout, rise: 2, fall: 3 }
}

fn tcp(port: u16) -> Check {
    check(CheckKind::Tcp, port, TIMEOUT)
}

fn http_within(port: u16, timeout: Duration) -> Check {
    let kind =
        CheckKind::Http { path: "/healthz?deep=1".into(), host: None, expect: vec![200..=299, 404..=404] };
    check(kind, port, timeout)
}

fn http(port: u16) -> Check {
    http_within(port, TIMEOUT)
}

/// A server for one connection: reads the request's head, then does as told.
async fn server<F>(answer: impl FnOnce(TcpStream) -> F + Send + 'static) -> (u16, JoinHandle<String>)
where
    F: Future<Output = ()> + Send,
{
    let listener = TcpListener::bind((V4, 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let task = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            match stream.read_u8().await {
                Ok(byte) => head.push(byte),
                Err(_) => break,
            }
        }
        answer(stream).await;
        String::from_utf8(head).unwrap()
    });
    (port, task)
}

async fn says(answer: impl Into<Vec<u8>>) -> u16 {
    let answer = answer.into();
    server(async move |mut stream: TcpStream| {
        let _ = stream.write_all(&answer).await;
        let _ = stream.shutdown().await;
    })
    .await
    .0
}

async fn outcome(answer: impl Into<Vec<u8>>) -> Result<(), Failure> {
    probe(&http(says(answer).await), V4).await.result
}

/// A port on which nobody listens: bound, so that no other test gets it, but not listening.
fn closed_port() -> (tokio::net::TcpSocket, u16) {
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.bind((V4, 0).into()).unwrap();
    let port = socket.local_addr().unwrap().port();
    (socket, port)
}

#[tokio::test]
async fn an_accepted_connection_is_a_success_in_both_families() {
    for address in [V4, V6] {
        let listener = TcpListener::bind((address, 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        // Nobody calls accept: the kernel's backlog answers.
        let probe = probe(&tcp(port), address).await;
        assert_eq!(probe.result, Ok(()), "{address}");
        assert!(probe.took < Duration::from_secs(1), "{:?}", probe.took);
    }
}

#[tokio::test]
async fn a_connection_that_nobody_closes_does_not_count_as_slow() {
    let listener = TcpListener::bind((V4, 0)).await.unwrap();
    let start = Instant::now();
    let probe = probe(&tcp(listener.local_addr().unwrap().port()), V4).await;
    assert!(start.elapsed() >= DRAIN_TIME);
    assert!(probe.took < DRAIN_TIME, "{:?}", probe.took);
}

#[tokio::test]
async fn a_tcp_probe_ends_in_a_normal_close_even_after_a_banner() {
    let listener = TcpListener::bind((V4, 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let backend = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        stream.write_all(b"220 mail ready\r\n").await.unwrap();
        let mut rest = Vec::new();
        let read = stream.read_to_end(&mut rest).await;
        // A reset would show here, or in the second write.
        (read.map_err(|e| e.kind()), stream.write_all(b"221 bye\r\n").await.is_ok())
    });
    assert_eq!(probe(&tcp(port), V4).await.result, Ok(()));
    assert_eq!(backend.await.unwrap(), (Ok(0), true));
}

#[tokio::test]
async fn a_closed_port_is_refused_which_is_hard_evidence() {
    let (_guard, port) = closed_port();
    for check in [tcp(port), http(port)] {
        let failure = probe(&check, V4).await.result.unwrap_err();
        assert_eq!(failure, Failure::Refused);
        assert!(failure.is_hard() && !failure.is_local());
    }
}

#[tokio::test]
async fn a_connect_without_an_answer_times_out_in_the_connect_phase() {
    // A full backlog drops further SYNs. The kernel admits one more than asked for.
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.bind((V4, 0).into()).unwrap();
    let listener = socket.listen(0).unwrap();
    let target = listener.local_addr().unwrap();
    let _first = TcpStream::connect(target).await.unwrap();
    let timeout = Duration::from_millis(200);
    let probe = probe(&check(CheckKind::Tcp, target.port(), timeout), V4).await;
    assert_eq!(probe.result, Err(Failure::TimedOut(Phase::Connect)));
    assert!(probe.took >= timeout && probe.took < TIMEOUT, "{:?}", probe.took);
}

#[tokio::test]
async fn a_server_that_hangs_times_out_in_the_response_phase() {
    let (port, _) = server(async |_stream: TcpStream| std::future::pending().await).await;
    let timeout = Duration::from_millis(200);
    let probe = probe(&http_within(port, timeout), V4).await;
    assert_eq!(probe.result, Err(Failure::TimedOut(Phase::Response)));
    assert!(probe.took >= timeout && probe.took < TIMEOUT, "{:?}", probe.took);
}

#[tokio::test]
async fn headers_that_drip_do_not_extend_the_timeout() {
    let (port, _) = server(async |mut stream: TcpStream| {
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nX-Slow: ").await;
        while stream.write_all(b"a").await.is_ok() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    let timeout = Duration::from_millis(300);
    let probe = probe(&http_within(port, timeout), V4).await;
    assert_eq!(probe.result, Err(Failure::TimedOut(Phase::Response)));
    assert!(probe.took >= timeout && probe.took < TIMEOUT, "{:?}", probe.took);
}

#[tokio::test]
async fn interim_responses_without_end_do_not_extend_the_timeout() {
    let (port, _) = server(async |mut stream: TcpStream| {
        while stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").await.is_ok() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    let probe = probe(&http_within(port, Duration::from_millis(300)), V4).await;
    assert_eq!(probe.result, Err(Failure::TimedOut(Phase::Response)));
}

#[tokio::test]
async fn more_interim_responses_than_a_head_may_be_long_are_a_failure() {
    let (port, _) = server(async |mut stream: TcpStream| {
        let many = b"HTTP/1.1 100 Continue\r\n\r\n".repeat(2048);
        while stream.write_all(&many).await.is_ok() {}
    })
    .await;
    let begin = Instant::now();
    let probe = probe(&http_within(port, Duration::from_secs(20)), V4).await;
    assert_eq!(probe.result, Err(too_large()));
    assert!(begin.elapsed() < Duration::from_secs(15));
}

#[tokio::test]
async fn work_that_is_always_ready_does_not_extend_the_timeout() {
    let busy = async {
        for _ in 0u64.. {
            tokio::task::coop::consume_budget().await;
        }
        Ok(())
    };
    let deadline = std::pin::pin!(tokio::time::sleep(Duration::from_millis(50)));
    let ended = within(Phase::Response, deadline, busy).await;
    assert_eq!(ended, Err(Failure::TimedOut(Phase::Response)));
}

#[tokio::test]
async fn every_expected_status_is_a_success() {
    for status in ["200 OK", "204 No Content", "299 Odd", "404 Not Found"] {
        let answer = format!("HTTP/1.1 {status}\r\n\r\n");
        assert_eq!(outcome(answer).await, Ok(()), "{status}");
    }
    assert_eq!(outcome("HTTP/1.0 200 OK\r\n\r\nold").await, Ok(()));
}

#[tokio::test]
async fn an_unexpected_status_is_named_with_what_was_expected() {
    let failure = outcome("HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n").await;
    let failure = failure.unwrap_err();
    assert_eq!(failure.to_string(), "status 503, expected 200-299, 404");
    assert!(!failure.is_hard() && !failure.is_local());
}

#[tokio::test]
async fn a_redirect_is_a_status_and_is_not_followed() {
    let listener = TcpListener::bind((V4, 0)).await.unwrap();
    let visits = Arc::new(AtomicUsize::new(0));
    let elsewhere = listener.local_addr().unwrap();
    let counter = visits.clone();
    tokio::spawn(async move {
        while listener.accept().await.is_ok() {
            counter.fetch_add(1, Ordering::SeqCst);
        }
    });
    let answer = format!("HTTP/1.1 302 Found\r\nLocation: http://{elsewhere}/\r\n\r\n");
    assert!(matches!(outcome(answer).await, Err(Failure::UnexpectedStatus { status: 302, .. })));
    assert_eq!(visits.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn what_is_not_http_is_malformed() {
    for answer in [
        "SSH-2.0-OpenSSH_9.2\r\n",
        "HTTP/1.1 2x0 OK\r\n\r\n",
        "HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
        "\0\u{1}\u{2}\u{3}\u{4}\u{5}\u{6}\u{7}\r\n\r\n",
        "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ] {
        let result = outcome(answer).await;
        assert!(matches!(result, Err(Failure::Malformed(_))), "{answer:?}: {result:?}");
    }
}

#[tokio::test]
async fn a_head_above_the_cap_is_malformed() {
    let big = format!("HTTP/1.1 200 OK\r\nX-Big: {}\r\n\r\n", "a".repeat(2 * MAX_HEAD_BYTES));
    let many = format!("HTTP/1.1 200 OK\r\n{}\r\n", "X: y\r\n".repeat(5000));
    for answer in [big, many] {
        let failure = outcome(answer).await.unwrap_err();
        assert_eq!(failure.to_string(), "malformed response: message head is too large");
    }
}

#[tokio::test]
async fn a_close_without_an_answer_has_its_own_words() {
    assert_eq!(outcome("").await, Err(Failure::ClosedEarly));
    assert_eq!(outcome("HTTP/1.1 200 O").await, Err(Failure::ClosedEarly));
}

#[tokio::test]
async fn a_reset_instead_of_an_answer_is_hard_evidence() {
    let listener = TcpListener::bind((V4, 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        stream.readable().await.unwrap();
        // Closing with unread data resets the connection.
        drop(stream);
    });
    let failure = probe(&http(port), V4).await.result.unwrap_err();
    assert_eq!(failure, Failure::Reset);
    assert!(failure.is_hard());
}

#[tokio::test]
async fn the_request_is_what_a_backend_expects() {
    let (port, task) = server(async |mut stream: TcpStream| {
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await;
    })
    .await;
    assert_eq!(probe(&http(port), V4).await.result, Ok(()));
    let version = env!("CARGO_PKG_VERSION");
    assert_eq!(
        task.await.unwrap(),
        format!(
            "GET /healthz?deep=1 HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\
             User-Agent: xlb/{version}\r\nConnection: close\r\n\r\n"
        )
    );
}

#[test]
fn the_host_header_is_the_configured_one_or_the_target() {
    let target = SocketAddr::new(V6, 8080);
    let host_to = |host| {
        let request = request(target, "/", host).unwrap();
        request.lines().find_map(|line| line.strip_prefix("Host: ").map(str::to_owned))
    };
    assert_eq!(host_to(None).as_deref(), Some("[::1]:8080"));
    assert_eq!(host_to(Some("web.example")).as_deref(), Some("web.example"));
}

#[test]
fn a_check_that_makes_no_request_is_the_fault_of_this_host() {
    let target = SocketAddr::new(V4, 80);
    let cases = [("no-slash", None), ("/with space", None), ("http://x/", None), ("/", Some("a\nb"))];
    for (path, host) in cases {
        let failure = request(target, path, host).unwrap_err();
        assert!(failure.is_local(), "{path} {host:?}: {failure}");
    }
}

#[tokio::test]
async fn a_short_body_is_read_so_that_the_server_sees_a_normal_close() {
    let (tx, rx) = oneshot::channel();
    let (port, _) = server(async move |mut stream: TcpStream| {
        let body = "a".repeat(3000);
        let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: 3000\r\n\r\n{body}");
        stream.write_all(answer.as_bytes()).await.unwrap();
        let mut rest = Vec::new();
        let _ = tx.send(stream.read_to_end(&mut rest).await.map_err(|e| e.kind()));
    })
    .await;
    assert_eq!(probe(&http(port), V4).await.result, Ok(()));
    assert_eq!(rx.await.unwrap(), Ok(0));
}

#[tokio::test]
async fn the_verdict_does_not_wait_for_a_server_that_is_slow_to_close() {
    let (port, _) = server(async |mut stream: TcpStream| {
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhea").await;
        std::future::pending().await
    })
    .await;
    let listener = TcpListener::bind((V4, 0)).await.unwrap();
    for check in [http(port), tcp(listener.local_addr().unwrap().port())] {
        let start = Instant::now();
        let (probe, closing) = Inquiry::new(&check, V4).unwrap().ask().await;
        assert_eq!(probe.result, Ok(()));
        assert!(start.elapsed() < DRAIN_TIME, "{:?}", start.elapsed());
        closing.unwrap().close().await;
        assert!(start.elapsed() >= DRAIN_TIME, "{:?}", start.elapsed());
    }
}

#[tokio::test]
async fn an_answer_of_known_length_is_closed_though_the_server_keeps_it_open() {
    for answer in ["HTTP/1.1 200 OK\r\nContent-length: 3\r\n\r\nyes", "HTTP/1.1 204 No\r\n\r\n"] {
        let (port, _) = server(async move |mut stream: TcpStream| {
            let _ = stream.write_all(answer.as_bytes()).await;
            std::future::pending().await
        })
        .await;
        let start = Instant::now();
        assert_eq!(probe(&http(port), V4).await.result, Ok(()));
        assert!(start.elapsed() < DRAIN_TIME, "{:?}", start.elapsed());
    }
}

#[tokio::test]
async fn a_head_may_come_in_pieces_and_after_interim_ones() {
    let (port, _) = server(async |mut stream: TcpStream| {
        for byte in b"HTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\nHTTP/1.1 404 Not Found\r\nX: y\r\n\r\n" {
            let _ = stream.write_all(&[*byte]).await;
            tokio::task::yield_now().await;
        }
    })
    .await;
    assert_eq!(probe(&http(port), V4).await.result, Ok(()));
    let together = "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 503 Busy\r\n\r\n";
    assert!(matches!(outcome(together).await, Err(Failure::UnexpectedStatus { status: 503, .. })));
    let switched = outcome("HTTP/1.1 101 Switching Protocols\r\n\r\n").await;
    assert!(matches!(switched, Err(Failure::UnexpectedStatus { status: 101, .. })));
}

#[tokio::test]
async fn a_body_without_end_does_not_delay_the_verdict() {
    let (port, _) = server(async |mut stream: TcpStream| {
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await;
        while stream.write_all(&[b'a'; 4096]).await.is_ok() {}
    })
    .await;
    let start = Instant::now();
    let probe = probe(&http(port), V4).await;
    assert_eq!(probe.result, Ok(()));
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
}

#[tokio::test]
async fn no_check_is_a_success_without_a_packet() {
    let probe = probe(&check(CheckKind::None, 0, TIMEOUT), V4).await;
    assert_eq!((probe.took, probe.result), (Duration::ZERO, Ok(())));
}

#[test]
fn system_errors_map_to_failures_in_words() {
    let rows = [
        (Errno::CONNREFUSED, "connection refused", false),
        (Errno::CONNRESET, "connection reset", false),
        (Errno::PIPE, "connection reset", false),
        (Errno::TIMEDOUT, "timed out connecting", false),
        (Errno::HOSTUNREACH, "host unreachable", false),
        (Errno::NETUNREACH, "network unreachable", false),
        (Errno::ACCESS, "administratively prohibited", false),
        (Errno::PERM, "not probed, a packet filter of this host rejects it", true),
        (Errno::MFILE, "not probed, no local resource: too many open files", true),
        (Errno::NFILE, "not probed, no local resource: too many open files in system", true),
        (Errno::NOBUFS, "not probed, no local resource: no buffer space available", true),
        (Errno::ADDRNOTAVAIL, "not probed, no local resource: cannot assign requested address", true),
        (Errno::PROTO, "protocol error", false),
    ];
    for (errno, text, local) in rows {
        let error = io::Error::from_raw_os_error(errno.raw_os_error());
        let failure = Failure::from_io(&error, Phase::Connect);
        assert_eq!((failure.to_string().as_str(), failure.is_local()), (text, local));
    }
}
